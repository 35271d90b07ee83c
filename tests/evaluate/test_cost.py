from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepquant import hub, methods
from stepquant.calib.record import Source
from stepquant.evaluate.cost import bit_operations, bits, cost, count_macs, coverage
from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import first_arguments
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.cpu import device, float_layers
from stepquant.runtime.cpu.products import ConvKernel
from stepquant.runtime.lower import lower
from tests.models.tiny import conditional, noise
from tests.runtime.synthetic import artifact_of, inputs_of, make, quantized

compiled = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")


def test_work_is_what_torch_counts(pipeline: DDIMPipeline) -> None:
    arguments = first_arguments(pipeline, 2)
    denoiser = Denoiser.of(pipeline)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        denoiser.predict(arguments)
    macs = count_macs(denoiser, arguments)
    assert sum(macs.values()) * 2 * 2 == counter.get_total_flops()  # two flops a MAC, two samples
    assert set(macs) == set(denoiser.sites()) | set(denoiser.products())


def test_coverage_names_every_site_and_why_it_is_float(pipeline: DDIMPipeline, source: Source) -> None:
    denoiser = Denoiser.of(pipeline)
    artifact = methods.build("minmax", {"samples": 4})(denoiser, scheme("w8a8"), source)
    other = copy.deepcopy(pipeline)
    hub.attach(other.unet, artifact)
    arguments = first_arguments(pipeline, 1)
    rows = coverage(denoiser, Denoiser.of(other), arguments)
    assert {row["path"]: row["macs"] for row in rows} == count_macs(denoiser, arguments)
    found = by_path(rows)
    assert found["conv_in"]["weight"] == "int8/channel"
    assert found["conv_in"]["integer"] is (found["conv_in"]["reason"] == "")
    assert "weight-only" in found["time_embedding.linear_1"]["reason"]
    weights = sum(value.nbytes for name, value in artifact.tensors.items())
    assert sum(row["bytes"] for row in rows) == weights

    plain = coverage(denoiser, denoiser, arguments)
    assert all(not row["integer"] for row in plain)
    layers = [pipeline.unet.get_submodule(path) for path in denoiser.sites()]
    assert sum(row["bytes"] for row in plain) == sum(p.nbytes for x in layers for p in x.parameters())


def conditional_twins(plan: Plan) -> tuple[Denoiser, Denoiser, dict[str, Any]]:
    """A float network over an image and a text, the same in integers, and a call of one sample."""
    torch.manual_seed(0)
    model = conditional().eval()
    given = {"sample": noise(1, 4, 16, 16), "encoder_hidden_states": noise(1, 7, 32)}
    artifact, _ = quantized(model, plan, lambda t: model(timestep=torch.tensor(t), **given).sample)
    return (
        Denoiser(model),
        Denoiser(lower(copy.deepcopy(model), artifact)),
        given | {"timestep": torch.tensor(355)},
    )


def by_path(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in rows}


@compiled
def test_masks_of_keys_and_of_queries_leave_attention_in_integers() -> None:
    """What is planned and what is traced are what they are without a mask."""
    source, lowered, arguments = conditional_twins(scheme("w8a8"))
    open_rows = by_path(coverage(source, lowered, arguments))
    keys = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0]])
    rows = by_path(coverage(source, lowered, arguments | {"encoder_attention_mask": keys}))
    assert rows == open_rows

    for path in source.products():
        if path.endswith("attn2"):
            attention = lowered.model.get_submodule(path)
            attention.register_forward_pre_hook(of_queries, with_kwargs=True)
    assert by_path(coverage(source, lowered, arguments)) == open_rows


def of_queries(_: Any, args: Any, kwargs: Any) -> Any:
    """A mask that differs by query for an attention to a text."""
    x, text = args[0], kwargs["encoder_hidden_states"]
    return args, kwargs | {"attention_mask": torch.randn(len(x), x.shape[1], text.shape[1])}


def test_work_of_integers_is_that_of_the_float_model() -> None:
    """Also where fused blocks call a product that the plan keeps float without calling its attention."""
    kept = Plan("kept", (Rule(None, "test", roles=("product",)), *scheme("w8a8").rules))
    source, lowered, arguments = conditional_twins(kept)
    rows = coverage(source, lowered, arguments)
    assert by_path(rows).keys() == count_macs(source, arguments).keys()
    assert {row["path"]: row["macs"] for row in rows} == count_macs(source, arguments)
    products = [row for row in rows if row["role"] == "product"]
    assert all(row["macs"] and row["reason"] == "the plan keeps it in float" for row in products)


@pytest.mark.parametrize("in_float", [False, True])
def test_a_grouped_convolution_is_what_its_kernel_did(
    in_float: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a kernel and gives no reason against it; whether that multiplies integers is for the trace to say."""
    monkeypatch.setattr(device, "why_no_integers", lambda groups: None)
    if in_float:
        monkeypatch.setattr(ConvKernel, "onednn", float_convolution)
    model = make()
    model.mid_block.resnets[0].conv1 = nn.Conv2d(32, 32, 3, padding=1, groups=4)
    lowered = lower(copy.deepcopy(model), artifact_of(model))
    arguments = {"timestep": torch.tensor(355), **inputs_of(model, 1)}
    rows = by_path(coverage(Denoiser(model), Denoiser(lowered), arguments))
    row = rows["mid_block.resnets.0.conv1"]
    assert row["macs"] == 8 * 8 * 32 * (32 // 4) * 9
    assert row["weight"] == "int8/channel"
    assert (row["integer"], row["kernel"]) == ((False, "") if in_float else (True, "convolution"))
    assert bool(row["reason"]) is in_float


def float_convolution(self: ConvKernel, codes: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
    g, centred = self.geometry, codes.float() - self.code.zero_point
    sums = nn.functional.conv2d(
        centred, self.weight().float(), None, g.stride, g.padding, g.dilation, g.groups
    )
    return (sums * (self.scales * self.code.scale)[:, None, None] + (0 if into is None else into)).to(dtype)


@compiled
def test_layers_that_are_faster_in_float_are_what_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer says of itself is not asked: its work is where it was multiplied."""
    model = make()
    lowered = lower(copy.deepcopy(model), artifact_of(model))
    arguments = {"timestep": torch.tensor(355), **inputs_of(model, 1)}
    twins = Denoiser(model), Denoiser(lowered)
    former = by_path(coverage(*twins, arguments))
    monkeypatch.setattr(float_layers, "race", lambda *_: (2e-5, 1e-5))
    kept = {one.path for one in float_layers.choose_float_layers(lowered, arguments, {}) if one.stays_float}
    rows = by_path(coverage(*twins, arguments))
    for path in kept:
        assert "bfloat16 is faster here" in rows[path]["reason"]
        layer = lowered.get_submodule(path)
        layer.ready = replace(layer.prepared(), reason=None)
    silent = by_path(coverage(*twins, arguments))
    for path, row in silent.items():
        assert row["macs"] == former[path]["macs"]
        assert row["integer"] is (former[path]["integer"] and path not in kept)
        assert bool(row["reason"]) is not row["integer"]
    assert {path for path in kept if former[path]["integer"]} == kept != set()


@pytest.mark.parametrize(("grid", "width"), [("int8/channel", 8), ("uint4/group32/sym", 4), ("float", 32)])
def test_bits_of_grids(grid: str, width: int) -> None:
    assert bits(grid) == width


def test_bit_operations_weigh_work_by_both_widths() -> None:
    rows = [
        {"weight": "int4/channel", "input": "uint8/tensor", "macs": 10},
        {"weight": "float", "input": "float", "macs": 1},
    ]
    assert bit_operations(rows) == 4 * 8 * 10 + 32 * 32


def test_cost_groups_by_both_widths() -> None:
    rows = [
        {"weight": "int4/channel", "input": "uint8/tensor", "macs": 10, "bytes": 5},
        {"weight": "int4/group32", "input": "uint8/tensor", "macs": 20, "bytes": 7},
        {"weight": "int8/channel", "input": "float", "macs": 3, "bytes": 1},
    ]
    found = cost(rows)
    assert found["rows"] == [
        {"weight": 4, "input": 8, "layers": 2, "macs": 30, "bops": 30 * 32, "bytes": 12},
        {"weight": 8, "input": 32, "layers": 1, "macs": 3, "bops": 3 * 256, "bytes": 1},
    ]
    assert (found["macs"], found["bops"], found["float_bops"], found["bytes"]) == (33, 1728, 33 * 1024, 13)
