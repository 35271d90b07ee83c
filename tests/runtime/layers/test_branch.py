"""Linears with a low-rank branch: what the product's epilogue adds, and what a tensor of its own would have added."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.runtime import ops
from stepquant.runtime.coverage import coverage
from stepquant.runtime.layers.linear import IntegerLinear
from stepquant.runtime.macs import Work
from tests.runtime.synthetic import filled, noise

WEIGHT = Grid.parse("int8/channel")
INPUTS = {
    name: Grid.parse(name) for name in ("int8/token", "int8/tensor", "uint8/tensor/asym", "int4/tensor")
}


def made(
    spec: LayerSpec, ins: int = 70, outs: int = 50, rank: int = 32, emit: torch.dtype = torch.float32
) -> IntegerLinear:
    torch.manual_seed(rank)
    layer = filled(nn.Linear(ins, outs), replace(spec, rank=rank), -1.5, 2.0)
    assert isinstance(layer, IntegerLinear)
    layer.emit = emit
    layer.low_rank.down.copy_(noise(rank, ins, seed=2) / ins**0.5)
    layer.low_rank.up.copy_(noise(outs, rank, seed=3))
    if spec.balanced:
        layer.input_factors.copy_(torch.rand(ins) + 0.5)
    return layer


def alone(layer: IntegerLinear, x: Tensor) -> Tensor:
    """The product of integers, in float64, by the numbers that its codes stand for."""
    weight = layer.signed_bytes().double() * layer.weight_scale.double()[:, None]
    codes, scales = layer.codes_of(layer.balanced(x))  # in a pass of its own
    numbers = (codes.double() - layer.code.zero_point) * (
        layer.code.scale if scales is None else scales.double()
    )
    return numbers @ weight.T + layer.bias.double()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("grid", INPUTS)
def test_a_branch_adds_the_input_as_it_comes(grid: str, balanced: bool, dtype: torch.dtype) -> None:
    """Beyond the ends of the grid, too, where the codes stay at these."""
    layer = made(LayerSpec(WEIGHT, INPUTS[grid], balanced=balanced))
    x = (3 * noise(2, 9, 70)).to(dtype)
    down, up = layer.low_rank.down.double(), layer.low_rank.up.double()
    truth = alone(layer, x) + x.double() @ down.T @ up.T
    magnitude = ((x.double().abs() @ down.abs().T) @ up.abs().T).amax()
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    got = layer(x)
    assert layer.integer
    assert (got.double() - truth).abs().amax() < tolerance * magnitude
    layer.low_rank.fuses = False
    beside = layer(x)
    assert (beside.double() - truth).abs().amax() < max(
        tolerance, 2.0**-10 if dtype == torch.float16 else 0
    ) * magnitude
    if ops.compiled() and dtype == torch.bfloat16:
        assert (got.double() - truth).norm() < (beside.double() - truth).norm(), "one rounding less"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", INPUTS)
def test_factors_enter_where_codes_are_made(grid: str, dtype: torch.dtype) -> None:
    layer, x = made(LayerSpec(WEIGHT, INPUTS[grid], balanced=True)), noise(2, 9, 70).to(dtype)
    codes, scales = layer.balanced_codes(x)
    apart, own = layer.codes_of(layer.balanced(x))
    assert torch.equal(codes, apart)
    assert (scales is None and own is None) or torch.equal(scales, own)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 7, 50])
def test_outputs_in_bfloat16_are_rounded_once(rank: int) -> None:
    for grid in ("int8/token", "int8/tensor"):
        layer, x = made(LayerSpec(WEIGHT, INPUTS[grid]), rank=rank), noise(5, 70)
        exact = layer(x)
        layer.emit = torch.bfloat16
        assert layer(x).dtype == torch.bfloat16
        if ops.compiled():
            assert torch.equal(layer(x), exact.bfloat16())


@torch.no_grad()
def test_a_row_is_the_same_in_every_batch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = made(LayerSpec(WEIGHT, INPUTS["int8/token"]), emit=dtype), noise(67, 70).to(dtype)
        assert torch.equal(layer(x)[40:], layer(x[40:]))
        assert torch.equal(layer(x)[3:4], layer(x[3:4]))


@torch.no_grad()
def test_new_sides_are_packed_anew() -> None:
    layer, x = made(LayerSpec(WEIGHT, INPUTS["int8/token"])), noise(5, 70)
    before = layer(x)
    layer.low_rank.down.mul_(2)
    layer.low_rank.up.mul_(0.5)
    assert torch.equal(layer(x), before)
    layer.low_rank.up.zero_()
    torch.testing.assert_close(layer(x).double(), alone(layer, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_work_is_that_of_both_products_wherever_they_run() -> None:
    layer, x = made(LayerSpec(WEIGHT, INPUTS["int8/token"])), noise(9, 70)
    whole, branch = 9 * 70 * 50, 9 * 32 * (70 + 50)
    with Work() as fused:
        layer(x)
    assert fused.macs.total() == whole + branch
    layer.low_rank.fuses = False
    with Work() as beside:
        layer(x)
    assert beside.macs.total() == whole + branch
    layer.low_rank.fuses = True
    lines = {line.path: line for line in coverage(nn.Sequential(layer), {"input": x}).lines}
    assert [(lines[path].macs, lines[path].integer) for path in ("0", "0.low_rank")] == [
        (whole, True),
        (branch, False),
    ]
    assert layer.low_rank.fuses, "as it was before"
