from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline
from torch import nn

from stepquant.evaluate.trajectory.probe import compare, cosine, relative_error, spread_out, sqnr, trace
from stepquant.evaluate.twins import Twins
from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import block_outputs
from stepquant.models.pipelines.unconditional import denoise
from stepquant.models.sampling import Sampling


def twin(pipeline: DDIMPipeline) -> DDIMPipeline:
    other = copy.deepcopy(pipeline)
    other.set_progress_bar_config(disable=True)
    return other


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_an_output_scaled_by_a_tenth_is_an_error_of_a_tenth_at_every_step(pipeline: DDIMPipeline) -> None:
    other = twin(pipeline)
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(1.1)
        other.unet.conv_out.bias.mul_(1.1)
    found = trace(Twins(pipeline, other), [1, 2], Sampling(6), block_steps=3)
    assert [row["step"] for row in found.steps] == list(range(6))
    assert [row["relative"] for row in found.steps] == pytest.approx([0.1] * 6, rel=1e-4)
    assert [row["cosine"] for row in found.steps] == pytest.approx([1.0] * 6)
    assert found.blocks["steps"] == [0, 2, 5]
    # Every block comes before the scaled layer.
    assert all(value == 200 for row in found.blocks["rows"] for value in row["sqnr"])


def test_own_trajectory_is_compared_with_the_float_states(pipeline: DDIMPipeline) -> None:
    other = twin(pipeline)
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(0.9)
    found = trace(Twins(pipeline, other), [5, 6], Sampling(5))
    # Each state is what the step before it led to; the first is the noise itself.
    mine, theirs = (list(denoise(pipe, [5, 6], Sampling(5))) for pipe in (other, pipeline))
    expected = [0.0] + [relative_error(a, b) for a, b in zip(mine[:-1], theirs[:-1])]
    assert [row["state_relative"] for row in found.steps] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found.steps[0]["own_relative"] == pytest.approx(found.steps[0]["relative"])
    assert found.steps[-1]["own_relative"] != pytest.approx(found.steps[-1]["relative"])


def test_times_are_those_of_the_sampler(pipeline: DDIMPipeline) -> None:
    pipeline.scheduler.set_timesteps(4)
    found = trace(Twins(pipeline, twin(pipeline)), [0], Sampling(4))
    assert [row["t"] for row in found.steps] == pipeline.scheduler.timesteps.tolist()


def test_noise_in_one_unit_is_seen_from_there_on(pipeline: DDIMPipeline) -> None:
    other = twin(pipeline)
    blocks = Denoiser.of(pipeline).blocks()
    place = len(blocks) // 2
    with torch.no_grad():
        for value in other.unet.get_submodule(blocks[place]).parameters():
            value.mul_(1.2)
    rows = {
        row["path"]: row["sqnr"]
        for row in trace(Twins(pipeline, other), [0], Sampling(3), block_steps=1).blocks["rows"]
    }
    assert all(rows[path] == [200.0] for path in blocks[:place])
    assert all(rows[path][0] < 100 for path in blocks[place:])


def test_units_that_hand_on_codes_have_no_number(pipeline: DDIMPipeline) -> None:
    target = torch.rand(1, 4)
    assert compare(None, target) is None
    assert compare(target[:, :2], target) is None
    with block_outputs(pipeline.unet, ["conv_in", "not.there"]) as found:
        pipeline.unet.conv_in.register_forward_hook(
            lambda *_: torch.zeros(1, dtype=torch.uint8), prepend=True
        )
        pipeline.unet.conv_in(torch.rand(1, 3, 8, 8))
    assert found == {}


def test_models_are_left_without_hooks(pipeline: DDIMPipeline) -> None:
    other = twin(pipeline)
    trace(Twins(pipeline, other), [0], Sampling(2))
    assert hooks(pipeline.unet) == hooks(other.unet) == 0


def test_measures_on_known_vectors() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert relative_error(b, a) == pytest.approx(0.8)
    assert cosine(b, a) == pytest.approx(0.6)
    assert sqnr(b, a) == pytest.approx(10 * torch.tensor(25 / 16).log10().item(), rel=1e-6)
    assert spread_out(100, 5) == [0, 25, 50, 74, 99]
    assert spread_out(3, 5) == [0, 1, 2]
    assert spread_out(0, 5) == []
