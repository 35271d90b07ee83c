"""Which metrics can run: networks whose weights are there, the data to compare with, and reasons for what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepquant.errors import EvaluationError, StepquantError
from stepquant.evaluate.metrics.classifiers import (
    ASKED,
    DEFAULT,
    SHIPPED,
    Classifier,
    read_classifier,
    shipped_classifier,
)
from stepquant.evaluate.metrics.measure import SingleMetric
from stepquant.evaluate.metrics.number import SAME_SEEDS, Number, unavailable
from stepquant.evaluate.metrics.pairs import PAIR_METRICS, PairMetric
from stepquant.evaluate.metrics.parts import read_parts
from stepquant.evaluate.metrics.reference import read_data
from stepquant.evaluate.metrics.sets import CLASSES, Target
from stepquant.evaluate.metrics.singles import PROMPTS, TextMetric
from stepquant.evaluate.metrics.truth import Truth
from stepquant.evaluate.networks.cache import CachedReader
from stepquant.evaluate.networks.clip import ClipScore, load_clip
from stepquant.evaluate.networks.inception import load_inception
from stepquant.evaluate.networks.lpips import Lpips, load_lpips
from stepquant.evaluate.networks.reader import Reader

COMPOSED = "characters"  # the data that the package knows the parts of


@dataclass(frozen=True)
class Weights:
    """Paths that the user gave: weights of measuring networks, and the parts of which legal images are composed."""

    inception: Path | None = None  # safetensors
    lpips: Path | None = None  # safetensors
    clip: Path | None = None  # folder
    classifier: Path | None = None  # folder
    truth: Path | None = None  # npz

    def given(self) -> dict[str, Path]:
        """The paths that were given, by the name of their network."""
        return {name: path for name, path in vars(self).items() if path is not None}


@dataclass(frozen=True)
class Networks:
    """The networks that could be loaded; the classifier and the parts may be those of the package."""

    inception: Reader | None = None
    lpips: Lpips | None = None
    clip: ClipScore | None = None
    classifier: Classifier | None = None
    truth: Truth | None = None

    def digests(self) -> dict[str, str]:
        """Digests of the loaded networks, by name."""
        return {name: network.digest for name, network in vars(self).items() if network is not None}


@dataclass(frozen=True)
class Instruments:
    """Everything that measures images of one size, the data they are compared with, and what cannot be measured."""

    readers: tuple[Reader, ...]
    metrics: tuple[PairMetric, ...]
    singles: tuple[SingleMetric, ...]
    targets: Mapping[str, Target]
    missing: tuple[Number, ...]


def load_networks(weights: Weights, data: str | None = None, *, prompted: bool) -> Networks:
    """Weights are read before anything slow begins; those of CLIP need prompts to compare with.

    data: as in `evaluate`; of what the package knows, it has the classifier and perhaps the parts.
    """
    if weights.clip is not None and not prompted:
        raise EvaluationError(
            "the CLIP score compares images with prompts, and there are none",
            fix="give --prompts FILE for a model that takes text, or leave --clip out",
        )
    composed = weights.truth is not None or data == COMPOSED
    return Networks(
        None if weights.inception is None else CachedReader(load_inception(weights.inception)),
        None if weights.lpips is None else load_lpips(weights.lpips),
        None if weights.clip is None else load_clip(weights.clip),
        find_classifier(weights.classifier, data),
        Truth(read_parts(weights.truth)) if composed else None,
    )


def find_classifier(folder: Path | None, data: str | None) -> Classifier | None:
    """The user's classifier, else that of the data set; other models have other classes than the default one."""
    if folder is not None:
        return read_classifier(folder)
    return shipped_classifier(data) if data in SHIPPED else None


def fit(networks: Networks, size: tuple[int, int], data: str | None, *, prompted: bool) -> Instruments:
    """The instruments for images of this height and width; a folder of data that was asked for must fit them."""
    readers: list[Reader] = []
    missing, distance = [], SHIPPED[DEFAULT].distance
    try:
        own = (networks.classifier or shipped_classifier()).extractor()
        distance = own.name
        if tuple(size) != (own.size, own.size):
            raise EvaluationError(
                f"its network reads {own.size}x{own.size} images, these are {size[0]}x{size[1]}"
            )
        readers.append(own)
    except StepquantError as error:
        missing.append(unavailable(distance, SAME_SEEDS, error.what))
    if networks.inception is not None:
        readers.append(networks.inception)
    if not readers and data is not None and data not in SHIPPED:
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
    missing += without_classes(networks, size, prompted)
    singles = find_singles(networks, size, prompted)
    return Instruments(tuple(readers), metrics, singles, targets, tuple(missing))


def find_singles(networks: Networks, size: tuple[int, int], prompted: bool) -> tuple[SingleMetric, ...]:
    """The metrics of single images; parts of another size than the images are an error."""
    out: list[SingleMetric] = []
    if networks.truth is not None:
        networks.truth.check(size)
        out.append(networks.truth)
    if networks.classifier is not None and prompted and networks.classifier.reads(size):
        out.append(networks.classifier)
    if networks.clip is not None:
        out.append(TextMetric(networks.clip))
    return tuple(out)


def find_data(reader: Reader, source: str | None, size: tuple[int, int]) -> Mapping[str, Target]:
    """What to compare with, as far as there is anything; a folder or file that was asked for must be there."""
    try:
        return read_data(source, reader, size)
    except EvaluationError:
        if source is not None and source not in SHIPPED:
            raise
        return {}


def without_data(readers: Sequence[Reader], targets: Mapping[str, Target], data: str | None) -> list[Number]:
    """Distances to data that are missing, because no data were given or known."""
    views = [view for reader in readers for view in reader.views if not view.classes]
    why = (
        f"say what the model was trained on: --data FOLDER of images, a file of statistics, or {' or '.join(SHIPPED)}"
        if data is None
        else f"'{data}' says nothing about it: give --data FOLDER of images"
    )
    return [unavailable(view.name, "data", why) for view in views if view.name not in targets]


def without_weights(networks: Networks, prompted: bool) -> list[Number]:
    """Metrics whose networks were not given, each with the option that would give them."""
    out = []
    if networks.lpips is None:
        out.append(unavailable("LPIPS", SAME_SEEDS, "give --lpips PATH"))
    if networks.inception is None:
        out += [unavailable(name, SAME_SEEDS, "give --inception PATH") for name in ("FID", "sFID", "KID")]
        out.append(unavailable("IS", CLASSES, "give --inception PATH", "higher"))
    if networks.clip is None and prompted:
        out.append(unavailable("CLIP score", PROMPTS, "give --clip DIR", "higher"))
    return out


def without_classes(networks: Networks, size: tuple[int, int], asked: bool) -> list[Number]:
    """Why there is no share of recognised images."""
    classifier = networks.classifier
    if not asked:
        return []
    if classifier is None:
        return [unavailable("recognised", ASKED, "give --classifier DIR", "higher")]
    if classifier.reads(size):
        return []
    side = classifier.net.size
    why = f"the classifier reads {side}x{side} images, these are {size[0]}x{size[1]}"
    return [unavailable("recognised", ASKED, why, "higher")]
