from __future__ import annotations

import pytest
import torch

from stepquant.core.affine import quantize
from stepquant.core.grid import Grid
from stepquant.core.rounding import alpha_of, anneal, enclosing, indecision, share_up

GRIDS = [Grid.parse("int4/channel"), Grid.parse("int8/channel"), Grid.parse("int4/channel/asym")]


def rows_and_range(grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, scales and zero points so that every weight lies inside the grid."""
    rows = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    zero_point = torch.zeros(5, 1) if grid.symmetric else torch.full((5, 1), -1.0)
    return rows, rows.abs().amax(1, keepdim=True) / (grid.qmax - 1), zero_point


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_start_reproduces_the_weights(grid: Grid) -> None:
    rows, scale, zero_point = rows_and_range(grid)
    lower, upper, fraction = enclosing(rows, scale, zero_point, grid)
    soft = lower + share_up(alpha_of(fraction)) * (upper - lower)
    torch.testing.assert_close((soft - zero_point) * scale, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_by_the_fraction_is_rounding_to_nearest(grid: Grid) -> None:
    rows, scale, zero_point = rows_and_range(grid)
    lower, upper, fraction = enclosing(rows * 1.5, scale, zero_point, grid)
    hard = torch.where(alpha_of(fraction) >= 0, upper, lower)
    assert torch.equal(hard, quantize(rows * 1.5, scale, zero_point, grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_soft_weights_are_the_formula_clipped_to_the_grid(grid: Grid) -> None:
    """Eq. 22 as written: scale * clip(floor + share, low, high)."""
    generator = torch.Generator().manual_seed(1)
    floor = torch.randint(-20, 20, (3, 50), generator=generator).float()
    share, scale = torch.rand(3, 50, generator=generator), torch.tensor([[0.25], [0.5], [1.0]])
    zero_point = torch.zeros(3, 1) if grid.symmetric else torch.tensor([[-1.0], [0.0], [2.0]])
    lower, upper, _ = enclosing(floor * scale, scale, zero_point, grid)
    expected = (floor + share).clamp(grid.qmin - zero_point, grid.qmax - zero_point) * scale
    torch.testing.assert_close((lower + share * (upper - lower) - zero_point) * scale, expected)


def test_share_reaches_its_ends_at_finite_alpha() -> None:
    assert share_up(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]
    shares = torch.linspace(0, 1, 21)
    torch.testing.assert_close(share_up(alpha_of(shares)), shares, rtol=0, atol=1e-6)


def test_indecision_vanishes_on_integers_only() -> None:
    assert indecision(torch.tensor([0.0, 1.0, 1.0]), 2.0) == 0
    assert indecision(torch.tensor([0.5]), 20.0) == 1
    assert indecision(torch.tensor([0.9]), 20.0) > indecision(torch.tensor([0.9]), 2.0) > 0


def test_anneal_goes_from_start_to_end() -> None:
    assert [anneal(p, 20, 2) for p in (-1, 0, 0.5, 1, 2)] == [20, 20, 11, 2, 2]
