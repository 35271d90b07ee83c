"""Layers whose scales have a float beside them that is added: what other programs write, and no integers multiply."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.errors import ArtifactError
from stepquant.runtime.layers.floating import float_layer
from stepquant.runtime.lower import integer_layer


@pytest.mark.parametrize(
    "grid", ["uint4/group8/sym", "int8/group8", "int8/channel", "uint8/tensor/sym", "uint5/group4"]
)
def test_numbers_are_codes_times_scale_plus_offset(grid: str) -> None:
    torch.manual_seed(0)
    layer, described = nn.Linear(16, 6), Grid.parse(grid)
    new = integer_layer(layer, LayerSpec(described, offset=True), "layer")
    rows = len(new.weight_scale)
    codes = torch.randint(described.qmin, described.qmax + 1, (rows, 96 // rows))
    scale, offset = torch.rand(rows) + 0.1, torch.randn(rows)
    new._buffers |= {"weight": pack(codes, described), "weight_scale": scale, "weight_offset": offset}
    zero_point = torch.zeros(rows, dtype=torch.int16)
    if not described.symmetric:
        zero_point = torch.randint(0, 31, (rows,), dtype=torch.int16)
        new._buffers["weight_zero_point"] = zero_point
    new._buffers["bias"] = layer.bias.detach()
    want = torch.tensor(
        [
            [(int(code) - int(z)) * float(s) + float(o) for code in row]
            for row, s, z, o in zip(codes, scale, zero_point, offset)
        ]
    ).reshape(6, 16)
    torch.testing.assert_close(float_layer(new).weight, want, rtol=1e-6, atol=1e-6)
    for x in (torch.randn(1, 16), torch.randn(40, 16)):
        torch.testing.assert_close(new(x), nn.functional.linear(x, want, layer.bias), rtol=1e-5, atol=1e-5)
    assert not new.integer


def test_an_offset_and_inputs_in_integers_do_not_go_together() -> None:
    said = {"weight": "uint4/group8/sym", "offset": True}
    assert LayerSpec.from_json(said).to_json() == said
    with pytest.raises(ArtifactError, match="'layer.offset' stands beside a grid of inputs"):
        LayerSpec.from_json(said | {"input": "int8/token"})
    with pytest.raises(ArtifactError, match=r"layer.offset"):
        LayerSpec.from_json(said | {"offset": 1})
