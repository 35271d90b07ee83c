"""Numbers about sets of images, in the features of an extractor: Frechet and kernel distance, nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from stepquant.evaluate.features import Extractor, Statistics, frechet, frechet_interval, merge
from stepquant.evaluate.manifold import DENSITY_NEIGHBOURS, compare_neighbours, kernel_distance
from stepquant.evaluate.metrics import OTHER_SEEDS, SAME_SEEDS, Measured, Number, mean_interval

NEIGHBOUR_NOTES = {
    "precision": "share of images that lie among the other set",
    "recall": "share of the other set that these images lie around",
    "density": "how crowded the other set is where images lie; may exceed one",
    "coverage": "share of the other set with an image nearby",
}


@dataclass(frozen=True)
class Target:
    """What sets are compared with: its name, the sums over its features, and some of the features themselves."""

    label: str
    blocks: tuple[Statistics, ...]
    features: Tensor | None
    note: str = ""


def set_numbers(extractor: Extractor, measured: Measured, data: Target | None) -> list[Number]:
    """Distances to the float model on the same seeds, to its other seeds, and to data, as far as they are there."""
    same = Target(SAME_SEEDS, measured.sums["float"], None, "falls with n: compare at the same n only")
    out: list[Number | None] = [distance(extractor, measured, same)]
    if "other" in measured.sums:
        other = Target(OTHER_SEEDS, measured.sums["other"], measured.features["other"])
        out += [kernel_number(extractor, measured, other), *neighbour_numbers(extractor, measured, other)]
    if data is not None:
        out.append(distance(extractor, measured, data))
        out += [kernel_number(extractor, measured, data), *neighbour_numbers(extractor, measured, data)]
    return [number for number in out if number is not None]


def distance(extractor: Extractor, measured: Measured, target: Target) -> Number:
    """The Frechet distance; images of the same seeds are drawn again together."""
    blocks, paired = measured.sums["quantized"], target.label == SAME_SEEDS
    value = frechet(merge(blocks), merge(target.blocks))
    low, high = frechet_interval(blocks, target.blocks, paired=paired)
    number = Number(extractor.name, target.label, merge(blocks).count, "lower", value, low, high)
    own = None if paired else frechet(merge(measured.sums["float"]), merge(target.blocks))
    number = replace(number, reference=own, extractor=extractor.digest, note=target.note)
    if "other" not in measured.sums:
        return number
    return replace(
        number, floor=frechet(merge(measured.sums["other"]), merge(target.blocks)), floor_of=OTHER_SEEDS
    )


def kernel_number(extractor: Extractor, measured: Measured, target: Target) -> Number | None:
    """The kernel distance; its interval is normal."""
    if target.features is None or len(target.features) <= DENSITY_NEIGHBOURS:
        return None
    value, error = kernel_distance(measured.features["quantized"], target.features)
    count = min(len(measured.features["quantized"]), len(target.features))
    name = extractor.name.replace("FD", "KD", 1)
    number = Number(name, target.label, count, "lower", value)
    low, high = (value + sign * 1.96 * error for sign in (-1, 1))
    number = replace(number, low=low, high=high, extractor=extractor.digest, note="does not depend on n")
    return with_others(number, measured, target, lambda x, y: kernel_distance(x, y)[0])


def neighbour_numbers(extractor: Extractor, measured: Measured, target: Target) -> list[Number]:
    """Precision, recall, density and coverage; intervals hold the other set fixed."""
    ours = measured.features["quantized"]
    if target.features is None or min(len(ours), len(target.features)) <= DENSITY_NEIGHBOURS:
        return []
    real = target.features[: len(ours)]
    found, out = compare_neighbours(real, ours[: len(real)]), []
    beside = {
        name: neighbour_means(real, features[: len(real)])
        for name, features in measured.features.items()
        if name == "float" or (name == "other" and target.label != OTHER_SEEDS)
    }
    for name, note in NEIGHBOUR_NOTES.items():
        values: Tensor = getattr(found, name)
        low, high = mean_interval(values)
        number = Number(name, target.label, len(real), "higher", float(values.mean()), low, high)
        number = replace(number, extractor=extractor.digest, note=note, reference=beside["float"][name])
        if "other" in beside:
            number = replace(number, floor=beside["other"][name], floor_of=OTHER_SEEDS)
        out.append(number)
    return out


def neighbour_means(real: Tensor, fake: Tensor) -> dict[str, float]:
    found = compare_neighbours(real, fake)
    return {name: float(getattr(found, name).mean()) for name in NEIGHBOUR_NOTES}


def with_others(
    number: Number, measured: Measured, target: Target, measure: Callable[[Tensor, Tensor], float]
) -> Number:
    """The same number with the float model in the quantized one's place: on the same seeds, and on others."""
    assert target.features is not None
    number = replace(number, reference=measure(measured.features["float"], target.features))
    if "other" not in measured.features or target.label == OTHER_SEEDS:
        return number
    return replace(number, floor=measure(measured.features["other"], target.features), floor_of=OTHER_SEEDS)
