from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.core.grid import Grid
from stepquant.core.levels import Levels, kind_of
from stepquant.core.ranges import minmax

GRIDS = [
    "int3/channel",
    "int4/channel/asym",
    "uint2/channel",
    "int2/channel/codebook",
    "int3/channel/codebook",
]


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> Grid:
    return Grid.parse(request.param)


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(5, 60, generator=torch.Generator().manual_seed(0)) + 0.3


def listed(levels: Levels) -> Tensor:
    """Every integer that a row may take, in order."""
    if levels.grid.codebook:
        return levels.codebook
    every = torch.arange(levels.grid.qmin, levels.grid.qmax + 1.0)
    return every.expand(len(levels.scale), -1)


def made(rows: Tensor, grid: Grid) -> tuple[Levels, Tensor, Tensor]:
    """The levels of narrowed rows, so that some numbers lie beyond the ends; every integer, and its number."""
    levels = kind_of(grid).fit(0.6 * rows, grid, minmax)
    every = listed(levels)
    return levels, every, (every - levels.zero_point) * levels.scale


def test_numbers_become_the_nearest_of_all(grid: Grid, rows: Tensor) -> None:
    levels, every, numbers = made(rows, grid)
    nearest = (rows[..., None] - numbers[:, None]).abs().argmin(-1)
    assert torch.equal(levels.integers(rows), every.gather(1, nearest))
    torch.testing.assert_close(levels.values(rows), numbers.gather(1, nearest))
    torch.testing.assert_close(levels.through(rows), numbers.gather(1, nearest))


def test_ends_and_gaps_are_those_of_all_numbers(grid: Grid, rows: Tensor) -> None:
    levels, every, numbers = made(rows, grid)
    low, high = levels.ends()
    torch.testing.assert_close(torch.cat([low, high], 1), torch.stack(numbers.aminmax(dim=1), 1))
    torch.testing.assert_close(levels.gaps(), numbers.diff(dim=1).mean(1, keepdim=True))
    below, above = levels.gaps_beside(every)
    inner = slice(1, -1)
    assert torch.equal((every + below)[:, inner], every[:, :-2])
    assert torch.equal((every + above)[:, inner], every[:, 2:])
    assert torch.equal(below[:, :1], -above[:, :1])
    assert torch.equal(above[:, -1:], -below[:, -1:])


def test_a_number_lies_between_the_two_that_enclose_it(grid: Grid, rows: Tensor) -> None:
    levels, every, numbers = made(rows, grid)
    lower, upper, share = levels.enclosing(rows)
    within = (rows >= numbers[:, :1]) & (rows <= numbers[:, -1:])
    assert within.any()
    assert not within.all()
    between = (lower + share * (upper - lower) - levels.zero_point) * levels.scale
    torch.testing.assert_close(between[within], rows[within])
    place = torch.searchsorted(every.contiguous(), lower.contiguous())
    after = every.gather(1, (place + 1).clamp(max=every.shape[1] - 1))
    assert torch.equal(upper[within], after[within])
    assert torch.equal(lower[~within], upper[~within])


def test_gradients_pass_to_what_lies_between_the_ends_and_to_scales(grid: Grid, rows: Tensor) -> None:
    levels, _, numbers = made(rows, grid)
    scale = levels.scale.clone().requires_grad_()
    learnt = rows.clone().requires_grad_()
    kind_of(grid)(grid, scale, levels.zero_point, levels.codebook).through(learnt).sum().backward()
    assert learnt.grad is not None
    assert scale.grad is not None
    # Half a gap beyond the ends still rounds to them.
    deep = (rows >= numbers[:, :1]) & (rows <= numbers[:, -1:])
    far = (rows < numbers[:, :1] - levels.gaps()) | (rows > numbers[:, -1:] + levels.gaps())
    assert torch.equal(learnt.grad[deep], torch.ones_like(rows[deep]))
    assert not learnt.grad[far].any()
    assert (scale.grad != 0).all()
