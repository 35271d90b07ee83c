"""One pass over generated images, and numbers about the pairs that come from the same seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.features import Extractor, Statistics, add_block
from stepquant.evaluate.pairs import PAIR_METRICS, SSIM_WINDOW, PairMetric

# Features beyond these go into the sums alone.
MOST_FEATURES = 5_000
SAME_SEEDS = "float, same seeds"
OTHER_SEEDS = "float, other seeds"
NEEDS_WEIGHTS = {
    "LPIPS": "needs the AlexNet network, which the package does not carry",
    "FID": "needs the InceptionV3 network, which the package does not carry",
}


@dataclass(frozen=True)
class Number:
    """One measured value and all that is needed to read it, or the reason why there is none.

    `floor` is the same number with the float model on other seeds in the quantized model's place;
    `reference`, against data, that of the float model on the same seeds.
    """

    name: str
    against: str
    n: int
    better: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    reference: float | None = None
    floor: float | None = None
    floor_of: str = ""
    extractor: str = ""
    note: str = ""
    unavailable: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Images of the same seeds from the float and from the quantized model, and other seeds from the float one."""

    float: Tensor
    quantized: Tensor
    other: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """What is kept of a stream of batches: a value per pair and metric, features, the first images.

    The keys of `sums` and `features` are the names of the sets in `Batch`; features are those of the first images.
    """

    pairs: Mapping[str, Tensor]
    other_pairs: Mapping[str, Tensor]  # empty without other seeds
    sums: Mapping[str, tuple[Statistics, ...]]
    features: Mapping[str, Tensor]
    shown: tuple[Tensor, Tensor]


def as_saved(images: Tensor) -> Tensor:
    """Images as an 8-bit file holds them, which is what data is."""
    return (images.float() * 255).round().clamp(0, 255) / 255


def measure(batches: Iterable[Batch], extractor: Extractor | None, keep: int = 0) -> Measured:
    """One pass; memory does not grow with the number of images, but for a few bytes each."""
    pairs: list[Mapping[str, Tensor]] = []
    other_pairs: list[Mapping[str, Tensor]] = []
    sums: dict[str, tuple[Statistics, ...]] = {}
    features: dict[str, list[Tensor]] = {}
    shown: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        pairs.append(compare(batch.float, batch.quantized))
        if batch.other is not None:
            other_pairs.append(compare(batch.float, batch.other))
        for name, found in extract(batch, extractor).items():
            sums[name] = add_block(sums.get(name, ()), Statistics.of(found))
            if sum(map(len, features.setdefault(name, []))) < MOST_FEATURES:
                features[name].append(found)
        if sum(len(seen) for seen, _ in shown) < keep:
            shown.append((batch.float.float().cpu(), batch.quantized.float().cpu()))
    if not pairs:
        raise EvaluationError("no images to measure", fix="give --images a positive number")
    none = torch.zeros(0, 3, 1, 1)
    first = [torch.cat([pair[side] for pair in shown])[:keep] if shown else none for side in (0, 1)]
    kept = {name: torch.cat(parts)[:MOST_FEATURES] for name, parts in features.items()}
    return Measured(join(pairs), join(other_pairs), sums, kept, (first[0], first[1]))


def extract(batch: Batch, extractor: Extractor | None) -> dict[str, Tensor]:
    """Features of every set in a batch."""
    if extractor is None:
        return {}
    return {
        name: extractor(as_saved(images)).float()
        for name, images in vars(batch).items()
        if images is not None
    }


def compare(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Every pair metric that such images allow."""
    if a.shape != b.shape:
        raise EvaluationError("paired images differ in size", got=tuple(b.shape), expected=tuple(a.shape))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise EvaluationError("a model generated NaN or infinite pixels", fix="try a scheme of more bits")
    found = {metric.name: metric.measure(a, b) for metric in PAIR_METRICS}
    return {name: values for name, values in found.items() if values is not None}


def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def mean_interval(values: Tensor, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            values[torch.randint(len(values), (len(values),), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def pair_number(metric: PairMetric, measured: Measured) -> Number:
    """The mean over pairs, with its interval."""
    values, other = measured.pairs.get(metric.name), measured.other_pairs.get(metric.name)
    if values is None:
        why = f"images are smaller than its window of {SSIM_WINDOW} pixels"
        return Number(metric.name, SAME_SEEDS, 0, metric.better, unavailable=why)
    low, high = mean_interval(values)
    return Number(
        metric.name,
        SAME_SEEDS,
        len(values),
        metric.better,
        float(values.mean()),
        low,
        high,
        metric.unit,
        floor=None if other is None else float(other.mean()),
        floor_of="" if other is None else OTHER_SEEDS,
        note=metric.note,
    )


def unavailable(name: str, against: str, why: str) -> Number:
    return Number(name, against, 0, "lower", unavailable=why)
