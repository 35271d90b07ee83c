"""The same layers by comfy-kitchen, where it is installed: what its own quantizer wrote, and what its product computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.core.rotation import rotate
from stepquant.hub.foreign.network import ForeignFile
from stepquant.hub.foreign.read import read
from stepquant.runtime.layers.floating import float_layer
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import integer_layer
from tests.foreign.writer import File
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


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("table", [True, False])
def test_external_codes_of_tables_are_the_same_bytes(bits: int, table: bool, tmp_path: Path) -> None:
    """What its quantizer writes stands for the bytes that its product multiplies."""
    from comfy_kitchen.backends.eager.w4a8_int8 import _dequant_int4_grouped_to_int8
    from comfy_kitchen.tensor.w4a8_int8 import AsymW4A8Int8Layout

    if bits == 6 and table:
        pytest.skip("codes of 6 bits have no table")
    torch.manual_seed(0)
    weight = torch.randn(32, 512)
    codes, params = AsymW4A8Int8Layout.quantize(weight, codebook=table, bits=bits)
    tensors = AsymW4A8Int8Layout.state_dict_tensors(codes, params)
    found = file_with(tensors, {"format": "asym_w4a8_int8"}, tmp_path)
    want = _dequant_int4_grouped_to_int8(codes, params.scale, params.codebook, 16)
    rows = found.layers["layer"].rows(found.file)
    assert torch.equal(rows.codes, want)
    assert torch.equal(rows.scales[:, 0], params.s_channel)
    assert found.layers["layer"].rotation == 256
    assert ("layer.weight_codebook" in found.file.entries) == table


def test_external_codes_of_four_bits_are_the_same(tmp_path: Path) -> None:
    from comfy_kitchen.tensor.convrot_w4a4 import TensorCoreConvRotW4A4Layout

    torch.manual_seed(0)
    codes, params = TensorCoreConvRotW4A4Layout.quantize(torch.randn(32, 512))
    tensors = TensorCoreConvRotW4A4Layout.state_dict_tensors(codes, params)
    found = file_with(tensors, {"format": "convrot_w4a4"}, tmp_path)
    rows, layer = found.layers["layer"].rows(found.file), found.layers["layer"]
    want = TensorCoreConvRotW4A4Layout.dequantize(codes, params)
    torch.testing.assert_close(rotate(rows.floats(), layer.rotation), want, rtol=0, atol=4e-6)


def file_with(tensors: dict[str, Tensor], said: dict[str, Any], tmp_path: Path) -> ForeignFile:
    file = File({f"layer.weight{leaf}": value for leaf, value in tensors.items()})
    file.mark("layer", said)
    return read(file.write(tmp_path / "some.safetensors"))
