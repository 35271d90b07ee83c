from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.frechet import Statistics, merge
from stepquant.evaluate.metrics.measure import Batch, as_saved, measure, pair_number
from stepquant.evaluate.metrics.number import mean_interval
from stepquant.evaluate.metrics.pairs import PAIR_METRICS, psnr
from stepquant.evaluate.networks.reader import Extractor


def images(count: int, seed: int, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_bootstrap_interval_of_a_mean_is_that_of_theory() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = mean_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (high + low) / 2 == pytest.approx(float(values.mean()), abs=0.01)


def test_one_pass_measures_what_the_whole_sets_have(extractor: Extractor) -> None:
    a, c = images(24, 3), images(24, 5)
    b = (a * 0.9).clamp(0, 1)
    parts = (Batch(*parts) for parts in zip(a.split(10), b.split(10), c.split(10)))
    found = measure(parts, [extractor], keep=4)
    torch.testing.assert_close(found.pairs["PSNR"], psnr(a, b))
    torch.testing.assert_close(found.other_pairs["PSNR"], psnr(a, c))
    assert set(found.pairs) == {metric.name for metric in PAIR_METRICS}
    assert found.shown[0].shape == (4, 3, 32, 32)
    sets = found.views["FD-C10"]
    for name, whole in (("float", a), ("quantized", b), ("other", c)):
        expected = extractor(as_saved(whole))
        torch.testing.assert_close(sets.features[name], expected)
        torch.testing.assert_close(merge(sets.sums[name]).outer, Statistics.of(expected).outer)


def test_other_seeds_are_optional(extractor: Extractor) -> None:
    found = measure([Batch(images(8, 1), images(8, 2))], [extractor])
    assert set(found.views["FD-C10"].sums) == {"float", "quantized"}
    assert found.other_pairs == {}
    assert found.shown[0].numel() == 0
    assert pair_number(PAIR_METRICS[0], found).floor is None


def test_a_number_without_a_value_says_why() -> None:
    number = pair_number(PAIR_METRICS[1], measure([Batch(images(2, 1, size=8), images(2, 2, size=8))]))
    assert number.value is None
    assert "11 pixels" in number.unavailable
    assert set(number.to_json()) == {field.name for field in dataclasses.fields(number)}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no images"),
        ([Batch(images(2, 0), images(2, 0, size=16))], "differ in size"),
        ([Batch(images(2, 0), images(2, 0) * torch.nan)], "NaN or infinite"),
    ],
)
def test_bad_images_are_named(batches: list[Batch], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure(batches)
