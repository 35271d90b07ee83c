"""Metrics of sets of images from the features of one view: Frechet and kernel distance, precision and recall, classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from stepquant.evaluate.metrics.frechet import Statistics, change_interval, frechet, frechet_interval, merge
from stepquant.evaluate.metrics.inception_score import inception_score, score_interval
from stepquant.evaluate.metrics.measure import Sets
from stepquant.evaluate.metrics.neighbours import DENSITY_NEIGHBOURS, compare_neighbours, kernel_distance
from stepquant.evaluate.metrics.number import OTHER_SEEDS, SAME_SEEDS, Number, mean_interval

NEIGHBOUR_NOTES = {
    "precision": "share of images that lie among the other set",
    "recall": "share of the other set that these images lie around",
    "density": "how crowded the other set is where images lie; may exceed one",
    "coverage": "share of the other set with an image nearby",
}
CLASSES = "classes of ImageNet"


@dataclass(frozen=True)
class Target:
    """What sets are compared with: its name, the sums over its features, and some of the features themselves."""

    label: str
    blocks: tuple[Statistics, ...]
    features: Tensor | None
    note: str = ""


def set_numbers(sets: Sets, data: Target | None) -> list[Number]:
    """The sets to compare with, as far as there are any: float images of the same seeds, of other seeds, and data."""
    if sets.view.classes:
        return [class_number(sets)]
    same = Target(SAME_SEEDS, sets.sums["float"], None, "falls with n: compare at the same n only")
    out: list[Number | None] = [distance(sets, same)]
    if "other" in sets.features:
        other = Target(OTHER_SEEDS, sets.sums["other"], sets.features["other"])
        out += [kernel_number(sets, other), *neighbour_numbers(sets, other)]
    if data is not None:
        out.append(distance(sets, data))
        out += [kernel_number(sets, data), *neighbour_numbers(sets, data)]
    return [number for number in out if number is not None]


def number_of(sets: Sets, name: str, against: str, n: int, better: str, value: float) -> Number:
    return Number(name, against, n, better, value, extractor=sets.extractor, resize=sets.resize)


def distance(sets: Sets, target: Target) -> Number:
    """The Frechet distance; its bootstrap draws both images of a seed together."""
    blocks, paired = sets.sums["quantized"], target.label == SAME_SEEDS
    value = frechet(merge(blocks), merge(target.blocks))
    low, high = frechet_interval(blocks, target.blocks, paired=paired)
    number = number_of(sets, sets.view.name, target.label, merge(blocks).count, "lower", value)
    number = replace(number, low=low, high=high, note=target.note)
    if not paired:
        own, data = sets.sums["float"], merge(target.blocks)
        least, most = change_interval(blocks, own, data)
        number = replace(number, reference=frechet(merge(own), data), change_low=least, change_high=most)
    if "other" not in sets.sums:
        return number
    return replace(
        number, floor=frechet(merge(sets.sums["other"]), merge(target.blocks)), floor_of=OTHER_SEEDS
    )


def kernel_number(sets: Sets, target: Target) -> Number | None:
    """The kernel distance with a normal interval of 95 %."""
    if target.features is None or len(target.features) <= DENSITY_NEIGHBOURS or not sets.view.kernel:
        return None
    value, error = kernel_distance(sets.features["quantized"], target.features)
    count = min(len(sets.features["quantized"]), len(target.features))
    number = number_of(sets, sets.view.kernel, target.label, count, "lower", value)
    low, high = (value + sign * 1.96 * error for sign in (-1, 1))
    number = replace(number, low=low, high=high, note="does not depend on n")
    return with_others(number, sets, target, lambda x, y: kernel_distance(x, y)[0])


def neighbour_numbers(sets: Sets, target: Target) -> list[Number]:
    """Precision, recall, density and coverage; intervals are for samples of one set with the other set fixed."""
    if target.features is None or not sets.view.kernel:
        return []
    ours = sets.features["quantized"]
    if min(len(ours), len(target.features)) <= DENSITY_NEIGHBOURS:
        return []
    real = target.features[: len(ours)]
    found, out = compare_neighbours(real, ours[: len(real)]), []
    beside = {
        name: neighbour_means(real, features[: len(real)])
        for name, features in sets.features.items()
        if name == "float" or (name == "other" and target.label != OTHER_SEEDS)
    }
    for name, note in NEIGHBOUR_NOTES.items():
        values: Tensor = getattr(found, name)
        low, high = mean_interval(values)
        number = number_of(
            sets, name + sets.view.suffix, target.label, len(real), "higher", float(values.mean())
        )
        number = replace(number, low=low, high=high, note=note, reference=beside["float"][name])
        if "other" in beside:
            number = replace(number, floor=beside["other"][name], floor_of=OTHER_SEEDS)
        out.append(number)
    return out


def neighbour_means(real: Tensor, fake: Tensor) -> dict[str, float]:
    found = compare_neighbours(real, fake)
    return {name: float(getattr(found, name).mean()) for name in NEIGHBOUR_NOTES}


def with_others(
    number: Number, sets: Sets, target: Target, measure: Callable[[Tensor, Tensor], float]
) -> Number:
    """The same number for the float model in place of the quantized one: with the same seeds, and with others."""
    assert target.features is not None
    number = replace(number, reference=measure(sets.features["float"], target.features))
    if "other" not in sets.features or target.label == OTHER_SEEDS:
        return number
    return replace(number, floor=measure(sets.features["other"], target.features), floor_of=OTHER_SEEDS)


def class_number(sets: Sets) -> Number:
    """The Inception Score of the quantized model's images, beside those of the float one's."""
    ours = sets.classes["quantized"]
    count = sum(split.count for split in ours.splits)
    number = number_of(sets, sets.view.name, CLASSES, count, "higher", inception_score(ours))
    low, high = score_interval(ours)
    note = "mean of splits of 5,000; grows with n"
    number = replace(number, low=low, high=high, note=note, reference=inception_score(sets.classes["float"]))
    if "other" not in sets.classes:
        return number
    return replace(number, floor=inception_score(sets.classes["other"]), floor_of=OTHER_SEEDS)
