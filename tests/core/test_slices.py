"""What is read slice by slice is what would be read at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepquant.core.grid import Grid
from stepquant.core.ranges import Search, lp_search_binned, minmax, percentile
from stepquant.core.slices import Slices, cuts

GRID = Grid.parse("uint8/tensor/sym")


def values() -> Tensor:
    x = torch.randn(6, 501, generator=torch.Generator().manual_seed(0))
    return torch.cat([x * x.abs(), -torch.zeros(1, 501), x[:1].round()])


def sliced(x: Tensor) -> Slices:
    return Slices(lambda: x.split(2), x.numel())


@pytest.mark.parametrize("search", [minmax, percentile, lp_search_binned], ids=lambda search: search.__name__)
@pytest.mark.parametrize("of", [values, lambda: values().bfloat16(), lambda: torch.full((5, 3), 0.5)])
def test_ranges_add_up_over_slices(search: Search, of: Callable[[], Tensor]) -> None:
    x = of()
    expected = search(x.reshape(1, -1), GRID)
    for end, wanted in zip(search(sliced(x), GRID), expected, strict=True):  # type: ignore[arg-type]
        assert end.shape == wanted.shape
        assert torch.equal(end, wanted)


def test_elements_of_a_rank_are_those_of_the_sorted_tensor() -> None:
    x = values()
    ordered = x.flatten().sort().values
    ranks = [0, 1, 17, 500, 2000, len(ordered) - 2, len(ordered) - 1]
    assert torch.equal(sliced(x).ranked(ranks), ordered[ranks])


def test_not_a_number_reaches_both_ends() -> None:
    x = values()
    x[5, 7] = torch.nan
    assert all(end.isnan() for end in sliced(x).ends)


def test_counts_beyond_what_single_floats_count() -> None:
    x = torch.zeros(1 << 23)
    x[0] = 1
    assert Slices(lambda: (x,) * 3, 3 * len(x)).histogram(2).tolist() == [3 * (len(x) - 1), 3]


@pytest.mark.parametrize("at_once", [1, 5, 12, 60, 70, 240, 10_000])
def test_cuts_cover_everything_once_and_in_order(at_once: int) -> None:
    shape = (4, 5, 6, 2)
    x = torch.arange(4 * 5 * 6 * 2).reshape(shape)
    parts = cuts(*shape, at_once=at_once)
    assert torch.equal(torch.cat([x[part].flatten() for part in parts]), x.flatten())
    assert all(x[part].numel() <= max(at_once, 2) for part in parts)
