from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline
from torch.utils.flop_counter import FlopCounterMode

from stepquant import hub, methods
from stepquant.calib.record import Source
from stepquant.evaluate.cost import bit_operations, bits, cost, count_macs, coverage
from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import first_arguments
from stepquant.quant.schemes import scheme


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
    by_path = {row["path"]: row for row in rows}
    assert by_path["conv_in"]["weight"] == "int8/channel"
    assert by_path["conv_in"]["integer"] is (by_path["conv_in"]["reason"] == "")
    assert "weight-only" in by_path["time_embedding.linear_1"]["reason"]
    weights = sum(value.nbytes for name, value in artifact.tensors.items())
    assert sum(row["bytes"] for row in rows) == weights

    plain = coverage(denoiser, denoiser, arguments)
    assert all(not row["integer"] for row in plain)
    layers = [pipeline.unet.get_submodule(path) for path in denoiser.sites()]
    assert sum(row["bytes"] for row in plain) == sum(p.nbytes for x in layers for p in x.parameters())


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
