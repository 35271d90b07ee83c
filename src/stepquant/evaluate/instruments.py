"""What measures: the networks that the user has weights for, fitted to the images at hand, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepquant.errors import EvaluationError, StepquantError
from stepquant.evaluate.clip import ClipScore, load_clip
from stepquant.evaluate.data import CIFAR10, read_data
from stepquant.evaluate.feature_cache import CachedReader
from stepquant.evaluate.features import Reader, embedded_extractor
from stepquant.evaluate.inception import load_inception
from stepquant.evaluate.lpips import Lpips, load_lpips
from stepquant.evaluate.metrics import SAME_SEEDS, Number, unavailable
from stepquant.evaluate.pairs import PAIR_METRICS, PairMetric
from stepquant.evaluate.sets import CLASSES, Target

PROMPTS = "prompts"


@dataclass(frozen=True)
class Weights:
    """Where the user keeps the weights of measuring networks."""

    inception: Path | None = None  # safetensors
    lpips: Path | None = None  # safetensors
    clip: Path | None = None  # folder

    def given(self) -> dict[str, Path]:
        """The files and folders that there are, by the name of their network."""
        return {name: path for name, path in vars(self).items() if path is not None}


@dataclass(frozen=True)
class Networks:
    """Networks as far as there are weights for them."""

    inception: Reader | None
    lpips: Lpips | None
    clip: ClipScore | None

    def digests(self) -> dict[str, str]:
        """Of the networks that there are, by name."""
        return {name: network.digest for name, network in vars(self).items() if network is not None}


@dataclass(frozen=True)
class Instruments:
    """Everything that measures images of one size, the data they are compared with, and what cannot be measured."""

    readers: tuple[Reader, ...]
    metrics: tuple[PairMetric, ...]
    clip: ClipScore | None
    targets: Mapping[str, Target]
    missing: tuple[Number, ...]


def load_networks(weights: Weights, *, prompted: bool) -> Networks:
    """Weights are read before anything slow begins; those of CLIP need prompts to compare with."""
    if weights.clip is not None and not prompted:
        raise EvaluationError(
            "the CLIP score compares images with prompts, and there are none",
            fix="give --prompts FILE for a model that takes text, or leave --clip out",
        )
    return Networks(
        None if weights.inception is None else CachedReader(load_inception(weights.inception)),
        None if weights.lpips is None else load_lpips(weights.lpips),
        None if weights.clip is None else load_clip(weights.clip),
    )


def fit(networks: Networks, size: tuple[int, int], data: str | None, *, prompted: bool) -> Instruments:
    """The instruments for images of this height and width; a folder of data that was asked for must fit them."""
    readers: list[Reader] = []
    missing = []
    try:
        own = embedded_extractor()
        if tuple(size) != (own.size, own.size):
            raise EvaluationError(
                f"its network reads {own.size}x{own.size} images, these are {size[0]}x{size[1]}"
            )
        readers.append(own)
    except StepquantError as error:
        missing.append(unavailable("FD-C10", SAME_SEEDS, error.what))
    if networks.inception is not None:
        readers.append(networks.inception)
    if not readers and data not in (None, CIFAR10):
        raise EvaluationError(
            f"nothing here can compare images of {size[1]}x{size[0]} with data",
            got=data,
            fix="give --inception PATH, or leave --data out",
        )
    metrics = PAIR_METRICS + (() if networks.lpips is None else (networks.lpips.metric(),))
    targets: dict[str, Target] = {}
    for reader in readers:
        targets |= find_data(reader, data, size)
    missing += without_data(readers, targets, data) + without_weights(networks, prompted)
    return Instruments(tuple(readers), metrics, networks.clip, targets, tuple(missing))


def find_data(reader: Reader, source: str | None, size: tuple[int, int]) -> Mapping[str, Target]:
    """What to compare with, as far as there is anything; a folder or file that was asked for must be there."""
    try:
        return read_data(source, reader, size)
    except EvaluationError:
        if source is not None and source != CIFAR10:
            raise
        return {}


def without_data(readers: Sequence[Reader], targets: Mapping[str, Target], data: str | None) -> list[Number]:
    """Distances to data that nothing is known about."""
    views = [view for reader in readers for view in reader.views if not view.classes]
    why = (
        "say what the model was trained on: --data FOLDER of images, a file of statistics, or cifar10"
        if data is None
        else f"'{data}' says nothing about it: give --data FOLDER of images"
    )
    return [unavailable(view.name, "data", why) for view in views if view.name not in targets]


def without_weights(networks: Networks, prompted: bool) -> list[Number]:
    """What needs networks that the package does not carry."""
    out = []
    if networks.lpips is None:
        out.append(unavailable("LPIPS", SAME_SEEDS, "give --lpips PATH"))
    if networks.inception is None:
        out += [unavailable(name, SAME_SEEDS, "give --inception PATH") for name in ("FID", "sFID", "KID")]
        out.append(unavailable("IS", CLASSES, "give --inception PATH", "higher"))
    if networks.clip is None and prompted:
        out.append(unavailable("CLIP score", PROMPTS, "give --clip DIR", "higher"))
    return out
