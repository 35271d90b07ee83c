"""Numbers between which a p-norm of quantization errors is said to lie, against the norm in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stepquant.core.affine import scale_and_zero
from stepquant.core.bracket import bracket, polynomial
from stepquant.core.grid import Grid

GRIDS = ("int8/channel", "int4/channel", "uint8/channel", "uint3/channel")
POWERS = (0.7, 1.0, 2.0, 2.4, 5.0, 8.0)


def exact(x: Tensor, low: Tensor, high: Tensor, grid: Grid, p: float) -> Tensor:
    scale, zero_point = (value.double()[:, None] for value in scale_and_zero(low, high, grid))
    q = (torch.round(x.double() / scale) + zero_point).clamp(grid.qmin, grid.qmax)
    return ((q - zero_point) * scale - x.double()).abs().pow(p).sum(1)


@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.5])
def test_the_norm_lies_between(text: str, p: float, fraction: float) -> None:
    grid, noise = Grid.parse(text), torch.Generator().manual_seed(0)
    x = torch.randn(12, 700, generator=noise) * torch.logspace(-6, 3, 12)[:, None]
    x[3:6] *= x[3:6].abs()
    x[6:9] += 2 * x[6:9].amax(1, keepdim=True)
    low, high = x.amin(1) * fraction, x.amax(1) * fraction
    outermost = x.gather(1, x.abs().topk(40, dim=1).indices)
    least, most = bracket(x, outermost, low, high, grid, p)
    norm = exact(x, low, high, grid, p)
    assert (least <= norm).all()
    assert (norm <= most).all()
    if fraction == 1.0 and grid.symmetric and p == 2.4:
        assert (most - least <= 0.03 * norm).all(), "so close that few candidates are left"


def test_others_that_are_clipped_leave_no_upper_end() -> None:
    grid, x = Grid.parse("int4/channel"), torch.linspace(-1, 1, 500)[None]
    outermost = x.gather(1, x.abs().topk(3, dim=1).indices)
    for fraction, finite in ((1.0, True), (0.9, False)):
        _, most = bracket(x, outermost, x.amin(1) * fraction, x.amax(1) * fraction, grid, 2.4)
        assert bool(most.isfinite().all()) is finite


@pytest.mark.parametrize("p", POWERS)
def test_the_polynomial_is_off_by_no_more_than_it_says(p: float) -> None:
    coefficients, off = polynomial(p)
    x = np.linspace(0, 0.5, 20_011)
    assert np.abs(np.polynomial.polynomial.polyval(x, coefficients) - x**p).max() <= off
    assert off < 0.2 * 0.5**p
