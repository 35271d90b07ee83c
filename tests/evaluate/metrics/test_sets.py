from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.evaluate.metrics.frechet import Statistics, frechet
from stepquant.evaluate.metrics.measure import Batch, Sets, as_saved, measure
from stepquant.evaluate.metrics.neighbours import compare_neighbours, kernel_distance
from stepquant.evaluate.metrics.number import OTHER_SEEDS, SAME_SEEDS, Number
from stepquant.evaluate.metrics.sets import Target, set_numbers
from stepquant.evaluate.networks.reader import Extractor


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


A, C, REAL = images(24, 3), images(24, 5), images(50, 9)
B = A * 0.8


def measured(extractor: Extractor, *, other: bool = True) -> Sets:
    return measure([Batch(A, B, C if other else None)], [extractor]).views["FD-C10"]


def by_place(numbers: list[Number]) -> dict[tuple[str, str], Number]:
    return {(number.name, number.against): number for number in numbers}


@pytest.fixture
def found(extractor: Extractor) -> dict[tuple[str, str], Number]:
    real = extractor(REAL)
    return by_place(set_numbers(measured(extractor), Target("data", (Statistics.of(real),), real)))


def test_distances_are_those_of_the_sets(extractor: Extractor, found: dict[tuple[str, str], Number]) -> None:
    sums = {x: Statistics.of(extractor(as_saved(y))) for x, y in (("a", A), ("b", B), ("c", C))}
    number = found["FD-C10", SAME_SEEDS]
    assert number.value == pytest.approx(frechet(sums["a"], sums["b"]), rel=1e-6)
    assert number.floor == pytest.approx(frechet(sums["a"], sums["c"]), rel=1e-6)
    assert number.reference is None
    assert (number.n, number.extractor) == (24, "abc")

    number, data = found["FD-C10", "data"], Statistics.of(extractor(REAL))
    assert number.value == pytest.approx(frechet(sums["b"], data), rel=1e-6)
    assert number.reference == pytest.approx(frechet(sums["a"], data), rel=1e-6)
    assert number.change_low < number.value - number.reference < number.change_high  # type: ignore[operator]
    assert number.floor == pytest.approx(frechet(sums["c"], data), rel=1e-6)


def test_kernel_and_neighbours_put_every_model_in_its_place(
    extractor: Extractor, found: dict[tuple[str, str], Number]
) -> None:
    a, b, c = (extractor(as_saved(x)) for x in (A, B, C))
    real = extractor(REAL)
    number = found["KD-C10", "data"]
    expected = [kernel_distance(x, real)[0] for x in (b, a, c)]
    assert [number.value, number.reference, number.floor] == pytest.approx(expected, rel=1e-6)
    number = found["coverage", "data"]
    expected = [float(compare_neighbours(real[:24], x).coverage.mean()) for x in (b, a, c)]
    assert [number.value, number.reference, number.floor] == pytest.approx(expected)
    number = found["recall", OTHER_SEEDS]
    expected = [float(compare_neighbours(c, x).recall.mean()) for x in (b, a)]
    assert [number.value, number.reference] == pytest.approx(expected)
    assert number.floor is None


def test_without_other_seeds_and_data_one_distance_is_left(extractor: Extractor) -> None:
    numbers = set_numbers(measured(extractor, other=False), None)
    assert [(x.name, x.against, x.floor) for x in numbers] == [("FD-C10", SAME_SEEDS, None)]


def test_data_without_features_has_the_frechet_distance_alone(extractor: Extractor) -> None:
    target = Target("data", (Statistics.of(extractor(REAL)),), None)
    numbers = by_place(set_numbers(measured(extractor, other=False), target))
    assert [name for name, against in numbers if against == "data"] == ["FD-C10"]
