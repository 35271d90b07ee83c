"""Layers whose inputs get the scale of each row, or image, as they come."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.affine import quantize
from stepquant.core.grid import Grid
from stepquant.errors import ArtifactError, PlanError
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.coverage import coverage
from stepquant.runtime.lower import lower
from tests.models.tiny import CASES
from tests.models.tiny.case import without_zeros
from tests.runtime.synthetic import filled, grids, make, noise, quantized, relative

BY_ROW = Grid.parse("int8/token")
LAYERS = {
    "linear": (lambda: nn.Linear(33, 19), (2, 7, 33)),
    "one row": (lambda: nn.Linear(5, 3, bias=False), (1, 5)),
    "convolution": (lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1), (3, 5, 7, 6)),
    "over time": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 3, 5, 5)),
    "over a line": (lambda: nn.Conv1d(4, 6, 3, padding=2), (2, 4, 9)),
}


@torch.no_grad()
@pytest.mark.parametrize("weight", ["int8/channel", "int4/channel"])
@pytest.mark.parametrize("kind", LAYERS)
def test_codes_and_sums_are_exact(kind: str, weight: str) -> None:
    torch.manual_seed(0)
    make_layer, shape = LAYERS[kind]
    layer = make_layer()
    x = noise(*shape) * torch.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    if shape[0] > 1:
        x[1] = 0
    new = filled(layer, grids(f"{weight} {BY_ROW}"), 0, 0)
    linear = isinstance(layer, nn.Linear)
    largest = (
        x.abs().amax(-1, keepdim=True) if linear else x.abs().amax(tuple(range(1, x.dim())), keepdim=True)
    )
    scales = torch.where(largest == 0, 1.0, largest / 127)
    codes = quantize(x, scales, torch.zeros(()), BY_ROW)
    integers = new.signed_bytes().double()
    call = nn.functional.linear if linear else layer._conv_forward
    sums = call(codes.double(), integers, None).float()
    along = [1] * sums.dim()
    along[new.outputs_dim] = -1
    want = sums * new.weight_scale.reshape(along) * scales
    want = want if new.bias is None else want + new.bias.reshape(along)
    assert new.integer
    assert new.kernel is None, "whoever fuses blocks hands it floats"
    assert torch.equal(new(x), want)
    assert relative(want, layer(x)) < (0.02 if "8" in weight else 0.2)


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_row() -> None:
    layer = filled(nn.Linear(8, 4), grids("int8/channel int8/token"), 0, 0)
    x = noise(3, 8)
    x[1, 2] = torch.nan
    assert layer(x).isnan().all(1).tolist() == [False, True, False]


@torch.no_grad()
@pytest.mark.parametrize("name", ["text_to_image", "class_transformer", "flux"])
def test_a_network_is_as_near_to_float_as_eight_bits_allow(name: str) -> None:
    torch.manual_seed(0)
    model, given, _ = CASES[name]()
    without_zeros(model)
    floating = model(**given).sample
    errors = {}
    for plan in ("w8a8", "w8a8-dynamic"):
        own = copy.deepcopy(model)

        def call(_: int, own: nn.Module = own) -> Tensor:
            return own(**given).sample

        artifact, (fake, *_) = quantized(own, scheme(plan), call)
        lowered = lower(own, artifact, torch.float32)
        errors[plan] = relative(lowered(**given).sample, floating)
    assert errors["w8a8-dynamic"] < 2 * max(errors["w8a8"], relative(fake, floating))
    found = coverage(lowered, given)
    assert found.share_of_planned == 1
    assert not any(name.endswith("input_scale") for name in artifact.tensors)


def test_only_inputs_and_only_around_zero() -> None:
    model = Denoiser(make())
    for text, port in (("int8/token", "weight"), ("uint8/token", "input")):
        rules = (Rule(Grid.parse(text), "", ports=(port,)), Rule(None, ""))
        with pytest.raises(PlanError, match="cannot carry"):
            Plan("own", rules).resolve(model)
    for entry in ({"weight": "int8/token"}, {"weight": "int8/channel", "input": "uint8/token"}):
        with pytest.raises(ArtifactError, match="cannot carry its grid"):
            LayerSpec.from_json(entry)


LAYOUTS = {
    "rows": lambda x: x.flatten(1),
    "rows of every second": lambda x: x.flatten(1)[:, ::2],
    "turned": lambda x: x.flatten(2).transpose(1, 2),
    "image": lambda x: x,
    "channels densest": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cut": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 3:],
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operations_are_what_defines_them_in_any_layout(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](noise(3, 37, 5, 7).to(dtype))
    x[1] = 0
    first = 1 if x.dim() == 4 else -1
    scales = ops.row_scales(x, first, 127)
    assert torch.equal(scales, ops.row_scales.plain(x, first, 127))
    code = ops.Code(1.0, 128, 1, 255)
    codes, want = ops.quantize_rows(x, scales, code), ops.quantize_rows.plain(x, scales, code)
    assert torch.equal(codes, want)
    assert codes.stride() == want.stride()
    channels = 1 if x.dim() == 4 else -1
    sums, bias = LAYOUTS[layout](noise(3, 37, 5, 7, seed=2) * 1e4), noise(x.shape[channels])
    for added in (bias, None):
        made, want = (
            call(sums, scales, added, channels, dtype) for call in (ops.scale_rows, ops.scale_rows.plain)
        )
        assert torch.equal(made, want)
        assert made.stride() == want.stride()


@pytest.mark.skipif(not ops.compiled(), reason="the kernels are not built")
def test_kernels_refuse_scales_of_other_rows() -> None:
    x, scales, code = noise(4, 6), torch.ones(3, 1), ops.Code(1.0)
    with pytest.raises(RuntimeError, match="quantize_rows"):
        ops.quantize_rows(x, scales, code)
    with pytest.raises(RuntimeError, match="scale_rows"):
        ops.scale_rows(x, scales, None, -1, torch.float32)
    with pytest.raises(RuntimeError, match="scale_rows"):
        ops.scale_rows(x, torch.ones(4, 1), torch.ones(5), -1, torch.float32)
