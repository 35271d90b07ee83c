"""Linears that rotate what they read before it gets the scale of each row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant import hub
from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.core.rotation import rotate
from stepquant.errors import ArtifactError, PlanError
from stepquant.hub.on_load import rounded
from stepquant.runtime.coverage import coverage
from stepquant.runtime.layers.floating import float_layer
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import integer_layer
from tests.models.tiny import CASES
from tests.models.tiny.case import without_zeros
from tests.runtime.synthetic import noise, relative

CHANNEL, TOKEN = Grid.parse("int8/channel"), Grid.parse("int8/token")


def made(layer: nn.Linear, group: int) -> IntegerLayer:
    spec = LayerSpec(CHANNEL, TOKEN, rotation=group)
    new = integer_layer(layer, spec, "layer")
    for name, value in rounded(layer.weight.detach(), spec).items():
        new._buffers[name] = value
    if layer.bias is not None:
        new._buffers["bias"] = layer.bias.detach().clone()
    return new


def with_outliers(*shape: int) -> Tensor:
    x = noise(*shape)
    x[..., 3] *= 100
    return x


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [4, 16, 64])
def test_it_is_what_its_maths_says(group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 24)
    new, x = made(layer, group), with_outliers(2, 7, 128).to(dtype)
    turned, weight = rotate(x, group), rotate(layer.weight, group)
    scale, weight_scale = turned.abs().amax(-1, keepdim=True) / 127, weight.abs().amax(-1) / 127
    codes = (turned * scale.reciprocal()).round()
    integers = (weight * weight_scale.reciprocal()[:, None]).round()
    sums = F.linear(codes.double(), integers.double()).float()
    want = sums * weight_scale * scale + layer.bias
    assert new.integer
    got = new(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    new.stay_float("a test")
    assert relative(new(x).float(), layer(x.float())) < 0.02


@torch.no_grad()
def test_rotation_shares_outliers_out() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 24), with_outliers(9, 256)
    x[:, 3] = 60 * x[:, 3].sign()
    plain = integer_layer(layer, LayerSpec(CHANNEL, TOKEN), "layer")
    for name, value in rounded(layer.weight, LayerSpec(CHANNEL, TOKEN)).items():
        plain._buffers[name] = value
    plain._buffers["bias"] = layer.bias
    want = layer(x)
    assert relative(made(layer, 256)(x), want) < 0.5 * relative(plain(x), want)


def test_the_way_back_is_for_inputs_as_they_come() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    back = float_layer(made(layer, 16))
    furthest = (back.weight - layer.weight).abs().max()
    assert 0 < furthest < layer.weight.abs().max() / 50


def test_gradients_are_those_of_the_layer_that_it_stands_for() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 8), noise(3, 64).requires_grad_()
    new = made(layer, 16)
    new(x).sum().backward()
    torch.testing.assert_close(x.grad, float_layer(new).weight.sum(0).expand(3, 64))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"weight": "int8/channel", "input": "int8/token", "rotation": 8}, "power of four"),
        ({"weight": "int8/channel", "input": "int8/token", "rotation": True}, "power of four"),
        ({"weight": "int8/channel", "input": "uint8/tensor", "rotation": 16}, "not rotated for"),
        ({"weight": "int4/group32", "input": "int8/token", "rotation": 16}, "not rotated for"),
    ],
)
def test_entries_that_cannot_be_are_refused(entry: dict[str, object], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        LayerSpec.from_json(entry)


@pytest.mark.parametrize("layer", [nn.Linear(24, 3), nn.Conv2d(16, 16, 1)])
def test_only_linears_whose_inputs_the_group_divides(layer: nn.Module) -> None:
    with pytest.raises(ArtifactError, match="groups of 16"):
        integer_layer(layer, LayerSpec(CHANNEL, TOKEN, rotation=16), "layer")


def test_specs_say_it_only_where_it_is() -> None:
    spec = LayerSpec(CHANNEL, TOKEN, rotation=16)
    assert LayerSpec.from_json(spec.to_json()) == spec
    assert "rotation" not in LayerSpec(CHANNEL, TOKEN).to_json()


@torch.no_grad()
def test_a_network_loads_rotated_is_saved_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given, _ = CASES["class_transformer"]()
    without_zeros(model)
    want = model(**given).sample
    model.save_pretrained(tmp_path / "float")
    config = hub.StepquantConfig("w8a8-dynamic", rotation=16)
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    rotated = [m for m in loaded.modules() if isinstance(m, IntegerLayer) and m.spec.rotation == 16]
    assert len(rotated) > 5
    assert all("rotated by 16" in repr(layer) for layer in rotated)
    got = loaded(**given).sample
    assert relative(got, want) < 0.05
    assert coverage(loaded, given).share_of_planned == 1
    loaded.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(again(**given).sample, got)
    assert hub.config_of(again).recipe["rotation"] == 16
    again.dequantize()
    assert relative(again(**given).sample, want) < 0.05


@pytest.mark.parametrize(
    ("scheme", "rotation", "words"),
    [
        ("w8a16", 16, "quantized by the token"),
        (None, 16, "quantized by the token"),
        ("w8a8-dynamic", 32, "no regular Hadamard matrix"),
    ],
)
def test_rotations_that_no_scheme_can_have(scheme: str | None, rotation: int, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        hub.StepquantConfig(scheme, rotation=rotation)


@torch.no_grad()
def test_a_lora_reads_what_was_not_rotated() -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    from stepquant.runtime.adapters.lora import register

    register()
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 8), noise(3, 64)
    own = made(layer, 16)
    model, before = (
        nn.Sequential(own, nn.Linear(8, 8)),
        own(x),
    )  # peft asks the first parameter for its device
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    branch = adapted.base_model.model[0]
    branch.lora_B["default"].weight.normal_()
    down, up = branch.lora_A["default"].weight, branch.lora_B["default"].weight
    torch.testing.assert_close(branch(x) - before, x @ down.T @ up.T, rtol=1e-4, atol=1e-4)
