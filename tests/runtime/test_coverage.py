"""Proof that integer kernels ran: from profiler traces, and from oneDNN's own log."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch.profiler import ProfilerActivity, profile

from stepquant.artifact import Artifact
from stepquant.core.grid import Grid
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime import lower, ops
from stepquant.runtime.coverage import coverage
from stepquant.runtime.cpu import device as cpu_device
from stepquant.runtime.cpu.products import ConvKernel, LinearKernel, why_no_integers
from stepquant.runtime.layers.convolution import IntegerConv2d
from tests.models.tiny import unconditional
from tests.runtime.synthetic import quantized

pytestmark = pytest.mark.skipif(why_no_integers(1) is not None, reason=str(why_no_integers(1)))
FLOAT_OPS = (
    "aten::conv2d",
    "aten::convolution",
    "aten::mkldnn_convolution",
    "aten::linear",
    "aten::addmm",
    "aten::mm",
)


# The stem as well, so that no convolution at all may run in float.
EVERYWHERE = scheme("w8a8").with_rules(
    [Rule(Grid.parse("uint8/tensor"), "nothing may hide", ("stem",), ("input",))]
)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def frozen(x: torch.Tensor) -> tuple[UNet2DModel, Artifact]:
    torch.manual_seed(0)
    model = unconditional(downsample_padding=0).eval()
    return model, quantized(model, EVERYWHERE, lambda t: model(x, t).sample)[0]


def lowered(frozen: tuple[UNet2DModel, Artifact]) -> UNet2DModel:
    model, artifact = frozen
    return lower.lower(copy.deepcopy(model), artifact)


def operations(model: UNet2DModel, x: torch.Tensor) -> dict[str, int]:
    """Operation -> calls in one pass whose t is known already."""
    with torch.no_grad():
        model(x, 5)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            model(x, 5)
    return {event.key: event.count for event in trace.key_averages()}


def prove(model: UNet2DModel, artifact: Artifact, x: torch.Tensor) -> None:
    """Every convolution and linear with quantized inputs ran as an integer operation, and none in float."""
    seen = operations(model, x)
    planned = [path for path, spec in artifact.layers.items() if spec.input is not None]
    convolutions = [path for path in planned if isinstance(model.get_submodule(path), IntegerConv2d)]
    ran = {kind: seen.get(kind.name, 0) + seen.get(kind.own_name, 0) for kind in (ConvKernel, LinearKernel)}
    assert ran[ConvKernel] == len(convolutions) > 10
    # q, k and v may be one product of three widths
    linears = len(planned) - len(convolutions)
    assert linears >= ran[LinearKernel] >= linears // 2
    assert not [name for name in FLOAT_OPS if name in seen]
    if ops.compiled():
        assert seen["stepquant::attention"] == len(artifact.products)


def test_the_trace_of_a_lowered_network_holds_integer_operations_only(
    frozen: tuple[UNet2DModel, Artifact], x: torch.Tensor
) -> None:
    prove(lowered(frozen), frozen[1], x)


def test_a_silent_float_fallback_fails_the_proof(
    frozen: tuple[UNet2DModel, Artifact], x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_device, "why_no_integers", lambda groups: "told to")
    model = lowered(frozen)
    with pytest.raises(AssertionError):
        prove(model, frozen[1], x)
    found = coverage(model, {"sample": x, "timestep": 5})
    assert {line.reason for line in found.lines if line.kind == "layer" and line.planned} == {"told to"}


def test_one_layer_that_falls_back_fails_the_proof(
    frozen: tuple[UNet2DModel, Artifact], x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lowered(frozen)
    layer = model.up_blocks[0].resnets[0].conv2
    monkeypatch.setattr(type(layer), "why_float", lambda self: "told to" if self is layer else None)
    layer.forget()
    with pytest.raises(AssertionError):
        prove(model, frozen[1], x)


def test_onednn_reports_kernels_on_bytes_where_it_computes(
    frozen: tuple[UNet2DModel, Artifact], tmp_path: str
) -> None:
    """The library's own log says which implementation ran, with the data types it was given."""
    script = (
        "import torch; from torch import nn\n"
        "from stepquant.runtime.cpu.products import PackedKernel; PackedKernel.make_product = lambda self: None\n"
        "from tests.runtime.synthetic import filled, grids\n"
        "spec = grids('int8/channel uint8/tensor')\n"
        "filled(nn.Conv2d(16, 16, 3, padding=1), spec, -1., 1.)(torch.randn(1, 16, 8, 8))\n"
        "filled(nn.Linear(32, 16), spec, -1., 1.)(torch.randn(4, 32))\n"
    )
    env = os.environ | {"ONEDNN_VERBOSE": "1", "PYTHONPATH": os.pathsep.join(["src", "."])}
    log = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    ).stdout
    ran = [line for line in log.splitlines() if ",exec,cpu," in line]
    for kind in (
        "convolution",
        "inner_product" if any("inner_product" in line for line in ran) else "matmul",
    ):
        mine = [line for line in ran if f",{kind}," in line]
        assert mine
        assert any(
            "src:u8" in line.replace("src_u8", "src:u8") and "s8" in line and "ref" not in line
            for line in mine
        )


def test_coverage_counts_every_multiplication(frozen: tuple[UNet2DModel, Artifact], x: torch.Tensor) -> None:
    model = lowered(frozen)
    found = coverage(model, {"sample": x, "timestep": 5})
    lines = {(line.path, line.kind): line for line in found.lines}
    assert lines["conv_in", "layer"].macs == 2 * 16 * 16 * 16 * 3 * 9
    assert lines["conv_in", "layer"].kernel == (ConvKernel.own_name if ops.compiled() else ConvKernel.name)
    attention = lines["mid_block.attentions.0", "product"]
    assert attention.macs == 2 * 2 * 4 * (8 * 8) ** 2 * 8
    assert attention.integer == ops.compiled()
    time = lines["time_embedding.linear_1", "layer"]
    assert (time.integer, time.planned) == (False, False)
    assert time.macs == 16 * 64
    assert "dequantized once" in (time.reason or "")
    assert sum(1 for line in found.lines if line.kind == "product") == len(frozen[1].products)
    if ops.compiled():
        assert found.share_of_planned == 1.0
        assert 0.95 < found.share_of_all < 1.0
    with torch.no_grad():
        again = model(x, 5).sample
    assert torch.equal(again, lowered(frozen)(x, 5).sample)


def test_coverage_of_the_embedded_configuration_is_nearly_all(x: torch.Tensor) -> None:
    """At least 99 % of the multiplications that the plan quantizes run in integers."""
    torch.manual_seed(0)
    model = unconditional(layers_per_block=2).eval()
    artifact, _ = quantized(model, EVERYWHERE, lambda t: model(x, t).sample)
    found = coverage(lower.lower(model, artifact), {"sample": x, "timestep": 5})
    assert found.share_of_planned >= (0.99 if ops.compiled() else 0.9)


def test_coverage_names_what_the_plan_keeps_in_float(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = unconditional().eval()
    rules = (Rule(None, "test", roles=("product", "down")), *scheme("w8a8").rules)
    plan = Plan("test", tuple(Rule(**{**vars(rule), "optional": True}) for rule in rules))
    artifact, _ = quantized(model, plan, lambda t: model(x, t).sample)
    found = coverage(lower.lower(model, artifact), {"sample": x, "timestep": 5})
    kept = {(line.path, line.kind) for line in found.lines if line.reason == "the plan keeps it in float"}
    assert ("mid_block.attentions.0", "product") in kept
    assert ("down_blocks.0.downsamplers.0.conv", "layer") in kept
    assert found.share_of_planned == 1.0
    assert all(line.macs > 0 for line in found.lines)


class Own(AttnProcessor):
    """Not one of those of diffusers, in whose place the integer product is kept."""


def test_an_attention_whose_processor_multiplies_by_itself_is_float(
    frozen: tuple[UNet2DModel, Artifact], x: torch.Tensor
) -> None:
    model = lowered(frozen)
    former = {line.path: line for line in coverage(model, {"sample": x, "timestep": 5}).lines}
    model.mid_block.attentions[0].processor = Own()
    with pytest.warns(UserWarning, match="Own computes its product itself"):
        found = {line.path: line for line in coverage(model, {"sample": x, "timestep": 5}).lines}
    changed = [path for path in found if found[path] != former[path]]
    assert changed == ["mid_block.attentions.0"]
    line = found["mid_block.attentions.0"]
    assert (line.macs, line.planned, line.integer) == (former[line.path].macs, True, False)
    assert "by itself, in float" in (line.reason or "")
