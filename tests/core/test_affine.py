import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.core.affine import (
    dequantize,
    fake_quantize,
    fake_quantize_ste,
    quantize,
    scale_and_zero,
    to_groups,
)
from stepquant.core.grid import Grid, GridError

GRIDS = [
    Grid(bits, signed, symmetric)
    for bits in (2, 4, 8)
    for signed in (True, False)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_integer_by_brute_force(grid: Grid) -> None:
    scale, zero_point = torch.tensor(0.37), torch.tensor(0.0 if grid.symmetric else float(grid.qmin + 1))
    x = torch.linspace(-60, 120, 1013)
    every = torch.arange(grid.qmin, grid.qmax + 1).float()
    distance = (x[:, None] - (every - zero_point) * scale).abs()
    got = (quantize(x, scale, zero_point, grid)[:, None] - zero_point) * scale
    assert torch.allclose((x[:, None] - got).abs()[:, 0], distance.min(1).values, atol=1e-5)


def test_against_numpy_half_to_even() -> None:
    grid = Grid.parse("int8/tensor")
    x = torch.arange(-300, 300).float() / 2
    expected = np.clip(np.rint(x.numpy()), -127, 127)
    assert np.array_equal(quantize(x, torch.tensor(1.0), torch.tensor(0.0), grid).numpy(), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=40, deadline=None)
@given(low=st.floats(-50, 50, width=32), width=st.floats(0, 100, width=32))
def test_zero_is_exact_and_the_range_is_covered(grid: Grid, low: float, width: float) -> None:
    lows, highs = torch.tensor([low]), torch.tensor([low + width])
    scale, zero_point = scale_and_zero(lows, highs, grid)
    assert fake_quantize(torch.zeros(1), scale, zero_point, grid).item() == 0
    ends = torch.cat([lows.clamp(max=0), highs.clamp(min=0)])
    if not grid.signed and grid.symmetric:
        ends = ends.clamp(min=0)
    covered = fake_quantize(ends, scale, zero_point, grid)
    assert ((covered - ends).abs() <= scale * 1.01 + 1e-6).all()


def test_straight_through_has_the_same_values_and_its_gradients() -> None:
    grid = Grid.parse("uint4/tensor")
    x = torch.linspace(-3, 9, 101, requires_grad=True)
    scale, zero_point = torch.tensor(0.5, requires_grad=True), torch.tensor(4.0)
    out = fake_quantize_ste(x, scale, zero_point, grid)
    assert torch.allclose(out, fake_quantize(x, scale, zero_point, grid), atol=1e-6)
    out.sum().backward()
    inside = (quantize(x, scale, zero_point, grid) - zero_point).detach()
    unclipped = ((x / scale).round() + zero_point >= 0) & ((x / scale).round() + zero_point <= 15)
    assert torch.equal(x.grad != 0, unclipped)
    # LSQ: the step's gradient is round(x/s) - x/s inside the range and the clipped integer outside.
    expected = torch.where(unclipped, inside - (x / scale).detach(), inside).sum()
    assert torch.allclose(scale.grad, expected, rtol=1e-4)


def test_elements_that_are_not_chosen_stay_and_pass_their_gradient() -> None:
    """Against recorded operations: torch.where over round-through-detach."""
    grid, generator = Grid.parse("uint4/tensor"), torch.Generator().manual_seed(0)
    x, chosen = 4 * torch.randn(300, generator=generator), torch.rand(300, generator=generator) < 0.5
    zero_point, found = torch.tensor([4.0]), []
    for is_ours in (True, False):
        inputs = x.clone().requires_grad_(), torch.tensor([0.5], requires_grad=True)
        if is_ours:
            out = fake_quantize_ste(*inputs, zero_point, grid, chosen)
        else:
            scaled = inputs[0] / inputs[1]
            q = scaled + (scaled.round() - scaled).detach() + zero_point
            out = torch.where(chosen, (q.clamp(0, 15) - zero_point) * inputs[1], inputs[0])
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(found[0][0][~chosen], x[~chosen])


def test_groups_share_rows() -> None:
    weight = torch.arange(2 * 8).reshape(2, 8)
    assert to_groups(weight, Grid.parse("int4/group4")).tolist() == weight.reshape(4, 4).tolist()
    assert to_groups(weight, Grid.parse("int4/channel")).shape == (2, 8)
    assert to_groups(weight, Grid.parse("int4/tensor")).shape == (1, 16)
    with pytest.raises(GridError, match="do not divide"):
        to_groups(weight, Grid.parse("int4/group3"))


def test_bfloat16_input_is_quantized_in_float32() -> None:
    grid = Grid.parse("uint8/tensor")
    for scale, value in itertools.product([0.02, 0.7], [0.333, 1.77, -0.2]):
        x = torch.tensor([value], dtype=torch.bfloat16)
        pair = torch.tensor(scale), torch.tensor(128.0)
        assert torch.equal(quantize(x, *pair, grid), quantize(x.float(), *pair, grid))
        assert fake_quantize(x, *pair, grid).dtype == torch.bfloat16
        assert torch.allclose(dequantize(quantize(x, *pair, grid), *pair), x.float(), atol=scale / 2 + 1e-6)
