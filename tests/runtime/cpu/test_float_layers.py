"""Layers that stay in float where this machine is faster so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.coverage import coverage
from stepquant.runtime.cpu import float_layers
from stepquant.runtime.cpu.float_layers import LayerTime, Seconds, choose_float_layers, release
from stepquant.runtime.cpu.products import why_no_integers
from stepquant.runtime.lower import lower, own_tensors
from tests.models.tiny import conditional, noise
from tests.runtime.synthetic import artifact_of, inputs_of, make, quantized, relative

pytestmark = pytest.mark.skipif(why_no_integers(1) is not None, reason=str(why_no_integers(1)))
SLOW, QUICK = (2e-5, 1e-5), (1e-5, 2e-5)


@pytest.fixture
def model() -> nn.Module:
    one = make()
    return lower(one, artifact_of(one))


def arguments(model: nn.Module) -> dict[str, object]:
    return {"timestep": torch.tensor(355), **inputs_of(model)}


def timed_as(monkeypatch: pytest.MonkeyPatch, slow: Callable[[str], bool]) -> None:
    """Let layers take twice or half the time of their float form, by what their text begins with."""
    forms = float_layers.forms

    def mark(layer: object, *rest: object) -> tuple[object, object]:
        forms(layer, *rest)  # type: ignore[arg-type]
        return layer, layer

    monkeypatch.setattr(float_layers, "forms", mark)
    monkeypatch.setattr(float_layers, "race", lambda layer, _: SLOW if slow(str(layer)) else QUICK)


def kept(found: list[LayerTime]) -> set[str]:
    return {layer.path for layer in found if layer.stays_float}


@torch.no_grad()
def call(model: nn.Module) -> Tensor:
    return model(**arguments(model)).sample


def test_every_integer_layer_is_timed_once_for_a_shape(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_layers, "ROUNDS", 1)
    known: dict[str, Seconds] = {}
    found = choose_float_layers(model, arguments(model), known)
    release(model)
    assert {layer.path for layer in found} == {line.path for line in coverage_lines(model) if line.integer}
    assert all(layer.integer > 0 and layer.floating > 0 for layer in found)
    assert 0 < len(known) < len(found)
    assert all("Geometry(stride=" in key for key in known)  # two walks over one shape are two layers
    monkeypatch.setattr(float_layers, "race", lambda *_: pytest.fail("timed again"))
    assert choose_float_layers(model, arguments(model), known) == found


def coverage_lines(model: nn.Module) -> list:
    return [line for line in coverage(model, arguments(model)).lines if line.kind == "layer"]


def test_a_layer_that_stays_float_takes_the_dequantized_weight_and_its_input_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = make()
    model = lower(copy.deepcopy(one), artifact_of(one), torch.float32)
    timed_as(monkeypatch, lambda text: text.startswith("IntegerConv2d"))
    found = choose_float_layers(model, arguments(model), {}, torch.float32)
    layer = model.down_blocks[0].resnets[0].conv1
    assert "down_blocks.0.resnets.0.conv1" in kept(found)
    x = noise(2, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    want = nn.functional.conv2d(x, layer.dequantized(torch.float32), layer.bias, padding=1)
    assert torch.equal(layer(x), want)
    reasons = {line.path: line.reason for line in coverage_lines(model)}
    assert reasons["down_blocks.0.resnets.0.conv1"] == "float32 is faster here: 10 us, not 20"


@pytest.mark.parametrize("kind", ["IntegerConv2d", "IntegerLinear", "Integer"])
def test_the_network_stays_as_near_to_float(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make()
    true = call(one)
    model = lower(copy.deepcopy(one), artifact_of(one))
    in_integers = call(model)
    timed_as(monkeypatch, lambda text: text.startswith(kind))
    assert kept(choose_float_layers(model, arguments(model), {}))
    outs = [call(model) for _ in range(4)]  # the later ones are recorded
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not torch.equal(outs[0], in_integers)
    assert relative(outs[0], true) < 1.2 * relative(in_integers, true)
    release(model)
    assert torch.equal(call(model), in_integers)


def test_what_is_saved_stays_the_same(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    former = {name: value.clone() for name, value in own_tensors(model).items()}
    timed_as(monkeypatch, lambda _: True)
    choose_float_layers(model, arguments(model), {})
    call(model)
    assert former.keys() == own_tensors(model).keys()
    assert all(torch.equal(value, former[name]) for name, value in own_tensors(model).items())


def test_layers_of_one_product_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """to_q alone is slow: together with to_k and to_v it is not, where all three read the same codes."""
    torch.manual_seed(0)
    one = conditional().eval()
    given = {"sample": noise(2, 4, 16, 16), "encoder_hidden_states": noise(2, 7, 32)}
    artifact, _ = quantized(one, scheme("w8a8"), lambda t: one(timestep=torch.tensor(t), **given).sample)
    model = lower(one, artifact)
    first = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    monkeypatch.setattr(float_layers, "forms", lambda layer, *_: (layer, layer))
    monkeypatch.setattr(
        float_layers, "race", lambda layer, _: (3e-5, 2e-5) if layer is first.to_q else (1e-5, 2e-5)
    )
    known = NoMemory()
    with_text = {"timestep": torch.tensor(355), **given}
    assert not kept(choose_float_layers(model, with_text, known))
    monkeypatch.setattr(
        float_layers, "race", lambda layer, _: (9e-5, 2e-5) if layer is first.to_q else (1e-5, 2e-5)
    )
    place = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert kept(choose_float_layers(model, with_text, known)) == {f"{place}.to_{name}" for name in "qkv"}
    with torch.no_grad():
        assert model(**with_text).sample.isfinite().all()


class NoMemory(dict):
    """Known times that forget: layers of equal shape are told apart."""

    def __contains__(self, _: object) -> bool:
        return False


@pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")
def test_forms_are_called_as_the_layer_was(model: nn.Module) -> None:
    """Doubled pixels and borders included: both forms put out the same shape."""
    layers = float_layers.integer_layers(model)
    readings = float_layers.read_once(model, layers, arguments(model))
    assert any(reading.doubled for reading in readings.values())
    assert any(reading.added for reading in readings.values())
    for path, reading in readings.items():
        integer, floating = float_layers.forms(layers[path], reading, torch.bfloat16)
        assert integer().shape == floating().shape, path
        assert integer().dtype == floating().dtype == reading.dtype
