from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.core.affine import quantize, scale_and_zero, to_groups
from stepquant.core.compensate import round_compensated
from stepquant.core.grid import Grid

GRIDS = [
    Grid.parse(text) for text in ("int4/channel", "int3/group8", "int4/channel/asym", "uint2/tensor/asym")
]


def problem(grid: Grid, seed: int = 0, columns: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, the Hessian of correlated inputs, and a scale and zero point for every weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, columns, generator=generator)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    rows = to_groups(weight, grid)
    ranges = scale_and_zero(rows.amin(1), rows.amax(1), grid)
    scale, zero_point = (value[:, None].expand_as(rows).reshape(weight.shape) for value in ranges)
    return weight, inputs.T @ inputs / len(inputs), scale, zero_point


def error(weight: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor) -> float:
    """tr(dW H dW^T)."""
    change = (weight - (integers - zero_point) * scale).double()
    return float((change @ hessian.double() * change).sum())


def by_inverting_again(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, order: list[int]
) -> Tensor:
    """Optimal brain quantization in a fixed order: the Hessian of the free columns is inverted for every column."""
    weight, out = weight.double().clone(), torch.empty_like(weight)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    for place, j in enumerate(order):
        free = order[place:]
        inverse = torch.linalg.inv(damped[free][:, free])
        out[:, j] = quantize(weight[:, j], scale[:, j], zero_point[:, j], grid)
        lost = weight[:, j] - (out[:, j] - zero_point[:, j]) * scale[:, j]
        weight[:, free] -= lost[:, None] * inverse[0] / inverse[0, 0]
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_it_equals_inverting_the_hessian_again_for_every_column(
    grid: Grid, by_importance: bool, block: int
) -> None:
    weight, hessian, scale, zero_point = problem(grid)
    order = list(range(24))
    if by_importance:
        order = hessian.diagonal().argsort(descending=True).tolist()
    ours = round_compensated(
        weight, hessian, scale, zero_point, grid, block=block, by_importance=by_importance
    )
    assert torch.equal(ours, by_inverting_again(weight, hessian, scale, zero_point, grid, order))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_outputs_err_less_than_with_rounding_to_nearest(grid: Grid, seed: int) -> None:
    weight, hessian, scale, zero_point = problem(grid, seed)
    nearest = quantize(weight, scale, zero_point, grid)
    ours = round_compensated(weight, hessian, scale, zero_point, grid)
    assert ours.min() >= grid.qmin
    assert ours.max() <= grid.qmax
    errors = [error(weight, hessian, integers, scale, zero_point) for integers in (ours, nearest)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("by_importance", [False, True])
def test_independent_inputs_round_to_nearest(by_importance: bool) -> None:
    grid = GRIDS[0]
    weight, hessian, scale, zero_point = problem(grid)
    alone = torch.diag(hessian.diagonal())
    ours = round_compensated(weight, alone, scale, zero_point, grid, by_importance=by_importance)
    assert torch.equal(ours, quantize(weight, scale, zero_point, grid))


def test_inputs_that_are_always_zero_stay_at_nearest_and_disturb_no_other() -> None:
    grid, dead = GRIDS[0], [3, 17]
    weight, hessian, scale, zero_point = problem(grid)
    hessian[dead], hessian[:, dead] = 0, 0
    alive = [j for j in range(24) if j not in dead]
    ours = round_compensated(weight, hessian, scale, zero_point, grid, damping=0)
    assert torch.equal(ours[:, dead], quantize(weight, scale, zero_point, grid)[:, dead])
    rest = (value[:, alive] for value in (weight, hessian[alive], scale, zero_point))
    assert torch.equal(ours[:, alive], round_compensated(*rest, grid, damping=0))
    nothing = round_compensated(weight, torch.zeros_like(hessian), scale, zero_point, grid)
    assert torch.equal(nothing, quantize(weight, scale, zero_point, grid))


def test_fewer_records_than_inputs_are_no_obstacle() -> None:
    grid = GRIDS[0]
    weight, _, scale, zero_point = problem(grid, columns=24)
    few = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    ours = round_compensated(weight, few.T @ few, scale, zero_point, grid)
    nearest = quantize(weight, scale, zero_point, grid)
    assert error(weight, few.T @ few, ours, scale, zero_point) < error(
        weight, few.T @ few, nearest, scale, zero_point
    )
