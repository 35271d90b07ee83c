"""One pass over generated images, and numbers about the pairs that come from the same seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.frechet import Statistics, add_block
from stepquant.evaluate.metrics.inception_score import ClassSums, add_classes
from stepquant.evaluate.metrics.number import OTHER_SEEDS, SAME_SEEDS, Number, mean_interval
from stepquant.evaluate.metrics.pairs import PAIR_METRICS, PairMetric
from stepquant.evaluate.networks.reader import Reader, View

# Rows of a block: intervals leave blocks out or draw them again, and a few hundred images must have more than a few.
BLOCK_ROWS = 16
# Rows of features kept for nearest neighbours; later ones go into the sums only.
MOST_FEATURES = 5_000
SETS = ("float", "quantized", "other")


@dataclass(frozen=True)
class Batch:
    """Images of the same seeds from the float and from the quantized model, and other seeds from the float one."""

    float: Tensor
    quantized: Tensor
    other: Tensor | None = None
    prompts: Sequence[str] = ()  # of the first two sets
    other_prompts: Sequence[str] = ()

    def asked(self, name: str) -> Sequence[str]:
        """What the images of a set were to show: prompts or classes; nothing where nobody asked."""
        return self.other_prompts if name == "other" else self.prompts

    def sets(self) -> dict[str, Tensor]:
        """The images by the names of their sets."""
        return {name: images for name in SETS if (images := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Sets:
    """What is kept of the features that one view sees in every set: sums over all rows, and the first rows themselves."""

    view: View
    extractor: str
    resize: str
    sums: Mapping[str, tuple[Statistics, ...]] = field(default_factory=dict)
    classes: Mapping[str, ClassSums] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, rows: Tensor) -> Sets:
        """With more rows of the set `name`."""
        if self.view.classes:
            return replace(self, classes={**self.classes, name: add_classes(self.classes.get(name), rows)})
        blocks = reduce(add_block, map(Statistics.of, rows.split(BLOCK_ROWS)), self.sums.get(name, ()))
        sums = {**self.sums, name: blocks}
        if not self.view.kernel:
            return replace(self, sums=sums)
        former = self.features.get(name, rows[:0])
        if len(former) >= MOST_FEATURES:
            return replace(self, sums=sums)
        kept = torch.cat([former, rows])[:MOST_FEATURES]
        return replace(self, sums=sums, features={**self.features, name: kept})


@dataclass(frozen=True)
class Measured:
    """What is kept of a stream of batches: a value per pair and metric, what every view saw, the first images."""

    pairs: Mapping[str, Tensor]
    other_pairs: Mapping[str, Tensor]  # empty without other seeds
    views: Mapping[str, Sets]
    singles: tuple[Mapping[str, Tensor], ...]  # values of each image by set, for each single metric
    shown: tuple[Tensor, Tensor]


class SingleMetric(Protocol):
    """Looks at images one by one, as an 8-bit file holds them."""

    def read(self, images: Tensor, asked: Sequence[Any]) -> Tensor:
        """Values (n, ...) of images that were to show what was `asked`, which is empty where nobody asked."""
        ...

    def numbers(self, values: Mapping[str, Tensor]) -> list[Number]:
        """Numbers from the values of all images, by the name of their set."""
        ...


def as_saved(images: Tensor) -> Tensor:
    """Images rounded to 8 bits, as those of data sets are."""
    return (images.float() * 255).round().clamp(0, 255) / 255


def measure(
    batches: Iterable[Batch],
    readers: Sequence[Reader] = (),
    keep: int = 0,
    metrics: Sequence[PairMetric] = PAIR_METRICS,
    singles: Sequence[SingleMetric] = (),
) -> Measured:
    """One pass; memory does not grow with the number of images, but for a few bytes each."""
    pairs: list[Mapping[str, Tensor]] = []
    other_pairs: list[Mapping[str, Tensor]] = []
    views = {
        view.name: Sets(view, reader.digest, reader.resize) for reader in readers for view in reader.views
    }
    alone: list[list[Mapping[str, Tensor]]] = [[] for _ in singles]
    shown: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        pairs.append(compare(batch.float, batch.quantized, metrics))
        if batch.other is not None:
            other_pairs.append(compare(batch.float, batch.other, metrics))
        saved = {name: as_saved(images) for name, images in batch.sets().items()}
        for name, images in saved.items():
            for reader in readers:
                for view, rows in reader.read(images).items():
                    views[view] = views[view].add(name, rows)
        for single, found in zip(singles, alone):
            found.append({name: single.read(images, batch.asked(name)) for name, images in saved.items()})
        if sum(len(seen) for seen, _ in shown) < keep:
            shown.append((batch.float.float().cpu(), batch.quantized.float().cpu()))
    if not pairs:
        raise EvaluationError("no images to measure", fix="give --images a positive number")
    none = torch.zeros(0, 3, 1, 1)
    first = [torch.cat([pair[side] for pair in shown])[:keep] if shown else none for side in (0, 1)]
    return Measured(join(pairs), join(other_pairs), views, tuple(map(join, alone)), (first[0], first[1]))


def compare(a: Tensor, b: Tensor, metrics: Sequence[PairMetric] = PAIR_METRICS) -> dict[str, Tensor]:
    """Every pair metric that such images allow."""
    if a.shape != b.shape:
        raise EvaluationError("paired images differ in size", got=tuple(b.shape), expected=tuple(a.shape))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise EvaluationError("a model generated NaN or infinite pixels", fix="try a scheme of more bits")
    found = {metric.name: metric.measure(a, b) for metric in metrics}
    return {name: values for name, values in found.items() if values is not None}


def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def pair_number(metric: PairMetric, measured: Measured) -> Number:
    """The mean over pairs, with its interval."""
    values, other = measured.pairs.get(metric.name), measured.other_pairs.get(metric.name)
    if values is None:
        return Number(metric.name, SAME_SEEDS, 0, metric.better, unavailable=metric.absent)
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
        extractor=metric.extractor,
        note=metric.note,
    )
