from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from stepquant import hub, methods
from stepquant.calib.record import Source
from stepquant.core.affine import fake_quantize
from stepquant.evaluate.trajectory.inputs import limits, see, watch_inputs
from stepquant.evaluate.trajectory.probe import trace
from stepquant.evaluate.twins import Twins
from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme


@pytest.fixture
def quantized(pipeline: DDIMPipeline, source: Source) -> DDIMPipeline:
    other = copy.deepcopy(pipeline)
    hub.attach(
        other.unet, methods.build("minmax", {"samples": 4})(Denoiser.of(pipeline), scheme("w8a8"), source)
    )
    return other


def test_limits_are_where_rounding_saturates(quantized: DDIMPipeline) -> None:
    found = limits(Denoiser.of(quantized))
    assert not {"time_embedding.linear_1", "conv_in"} & set(found)  # their inputs stay float
    layer = quantized.unet.get_submodule("conv_out")
    far = torch.tensor([-1e6, 1e6])
    ends = fake_quantize(far, layer.input_scale, layer.input_zero_point, layer.spec.input)
    half = float(layer.input_scale) / 2
    assert found["conv_out"] == pytest.approx((float(ends[0]) - half, float(ends[1]) + half), rel=1e-6)


def test_clipped_is_the_share_outside() -> None:
    found = see(torch.tensor([-3.0, -1.0, 0.0, 4.0]), (-1.0, 2.0))
    assert (found.low, found.high, found.clipped) == (-3, 4, 0.5)
    assert see(torch.zeros(2), None).clipped is None


def test_layers_are_watched_only_while_wanted(pipeline: DDIMPipeline) -> None:
    denoiser, arguments = Denoiser.of(pipeline), first_arguments(pipeline, 1)
    for wanted in (False, True):
        with torch.no_grad(), watch_inputs(denoiser, {}, lambda wanted=wanted: wanted) as found:
            denoiser.predict(arguments)
        assert set(found) == (set(denoiser.sites()) if wanted else set())
    x: Tensor = arguments["sample"]
    assert (found["conv_in"].low, found["conv_in"].high) == (float(x.min()), float(x.max()))


def test_trace_has_a_row_for_every_layer_and_probed_step(
    pipeline: DDIMPipeline, quantized: DDIMPipeline
) -> None:
    found = trace(Twins(pipeline, quantized), [1, 2], Sampling(4), block_steps=3)
    rows = {row["path"]: row for row in found.inputs}
    assert set(rows) == set(Denoiser.of(pipeline).sites())
    assert all(len(row["clipped"]) == 3 for row in found.inputs)
    states = rows["conv_in"]
    assert states["high"][0] == pytest.approx(float(first_noise().max()))


def first_noise() -> Tensor:
    draws = [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return torch.cat(draws)
