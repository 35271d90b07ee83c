"""The same layers by comfy-kitchen, where it is installed: what its own quantizer wrote, and what its product computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.runtime.layers.floating import float_layer
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import integer_layer
from tests.runtime.synthetic import relative

kitchen: Any = pytest.importorskip("comfy_kitchen", reason="the outside reference is comfy-kitchen")


def layers(group: int) -> tuple[nn.Linear, IntegerLayer, Any, Any]:
    """The float layer, ours with its integers, and its integers with their parameters."""
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout

    torch.manual_seed(0)
    layer = nn.Linear(512, 96)
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    codes, params = TensorWiseINT8Layout.quantize(layer.weight.detach(), per_channel=True, **rotation)
    grid = Grid.parse("int8/channel")
    ours = integer_layer(layer, LayerSpec(grid, Grid.parse("int8/token"), rotation=group), "layer")
    ours._buffers |= {
        "weight": pack(codes, grid),
        "weight_scale": params.scale.flatten(),
        "bias": layer.bias.detach(),
    }
    return layer, ours, codes, params


@pytest.mark.parametrize("group", [0, 16, 64, 256])
def test_external_weights_stand_for_the_same_numbers(group: int) -> None:
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout

    _, ours, codes, params = layers(group)
    want = TensorWiseINT8Layout.dequantize(codes, params)
    torch.testing.assert_close(float_layer(ours).weight, want.float(), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("group", [0, 16, 64, 256])
def test_external_products_are_the_same(group: int) -> None:
    layer, ours, codes, params = layers(group)
    x = torch.randn(33, 512)
    x[:, 7] *= 30
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    with kitchen.use_backend("eager"):
        want = kitchen.int8_linear(x, codes, params.scale, layer.bias, torch.float32, **rotation)
    assert relative(ours(x), want) < 1e-3  # where a rounding falls the other way, a code differs by one
    assert relative(ours(x), layer(x)) < 0.05
