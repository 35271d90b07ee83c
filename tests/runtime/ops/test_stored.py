"""A weight multiplied as it is stored: the same bytes as its definition, and as the dequantized weight within rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.runtime import ops
from stepquant.runtime.layers.linear import IntegerLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "ins", "outs", "groups"),
    [(1, 2, 1, 1), (2, 66, 5, 1), (3, 96, 17, 3), (7, 130, 33, 1), (5, 1152, 9, 9)],
)
def test_every_byte_is_that_of_the_definition(
    rows: int, ins: int, outs: int, groups: int, bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(rows, ins) * 10.0 ** torch.randint(-3, 4, (rows, ins))).to(dtype)
    weight = torch.randint(0, 256, (outs * ins * bits // 8,), dtype=torch.uint8)
    zeros = torch.randint(-300, 300, (outs, groups), dtype=torch.int16)
    scale, bias = torch.rand(outs, groups), torch.randn(outs)
    for given in (bias, None):
        arguments = x, weight, bits, zeros, scale, given, dtype
        assert torch.equal(ops.stored_linear(*arguments), ops.stored_linear.plain(*arguments))


GRIDS = [
    Grid(8, True, True, "channel"),
    Grid(8, False, False, "channel"),
    Grid(4, True, True, "tensor"),
    Grid(4, False, False, "group", 8),
]


def layer_of(grid: Grid, ins: int = 24) -> IntegerLinear:
    torch.manual_seed(0)
    layer = IntegerLinear(nn.Linear(ins, 10), LayerSpec(weight=grid, input=None))
    integers = torch.randint(grid.qmin, grid.qmax + 1, (10, ins))
    layer.weight = pack(integers, grid)
    layer.weight_scale = torch.rand_like(layer.weight_scale)
    layer.bias = torch.randn(10)
    if not grid.symmetric:
        layer.weight_zero_point = torch.randint(
            grid.qmin, grid.qmax, layer.weight_scale.shape, dtype=torch.int16
        )
    return layer


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_layer_multiplies_what_it_would_dequantize(grid: Grid) -> None:
    layer, x = layer_of(grid), torch.randn(2, 3, 24)
    assert layer.reads_stored(x) == ops.compiled()
    truth = x.double() @ layer.dequantized(torch.float32).double().T + layer.bias.double()
    torch.testing.assert_close(layer(x), truth.float(), rtol=1e-5, atol=1e-5)
    many = torch.randn(9, 9, 24)
    assert not layer.reads_stored(many)
    assert layer(many).shape == (9, 9, 10)


def test_what_no_kernel_reads_is_dequantized() -> None:
    x = torch.randn(2, 24)
    assert not layer_of(Grid(6, True, True, "channel")).reads_stored(x)
    assert not layer_of(Grid(4, True, True, "channel"), 23).reads_stored(x[:, :23])
