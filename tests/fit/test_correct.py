"""Corrections against synthetic errors whose make-up is known, and against independent formulas."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

from stepquant.calib.record import Source
from stepquant.core.steps import StepTable
from stepquant.errors import MethodError
from stepquant.fit.correct import Moments, check_noise, follow, offset_of, try_step
from stepquant.methods import d2dpm, ptqd, tac
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_step(exact: Tensor, quantized: Tensor) -> Moments:
    moments = Moments.of(exact, quantized)
    return Moments(*(value[None] for value in vars(moments).values()))


def test_moments_are_those_of_numpy() -> None:
    exact, quantized = noise(9, 3, 4, 5), noise(9, 3, 4, 5, seed=1) + 0.3
    moments = Moments.of(exact, quantized)
    a, b = (x.double().transpose(0, 1).flatten(1).numpy() for x in (exact, quantized))
    import numpy as np

    for channel in range(3):
        covariance = np.cov(a[channel], b[channel], bias=True)
        assert moments.exact_variance[channel].item() == pytest.approx(covariance[0, 0])
        assert moments.quantized_variance[channel].item() == pytest.approx(covariance[1, 1])
        assert moments.covariance[channel].item() == pytest.approx(covariance[0, 1])
        assert moments.error_variance[channel].item() == pytest.approx(np.var(b[channel] - a[channel]))


def test_the_make_up_of_a_synthetic_error_is_recovered() -> None:
    """e = k eps + b + noise: all three come back, and the corrected prediction is the exact one plus noise."""
    exact = noise(64, 3, 16, 16)
    k, bias, spread = 0.2, torch.tensor([0.1, -0.3, 0.05]), 0.15
    rest = spread * noise(*exact.shape, seed=1)
    quantized = exact + k * exact + bias.reshape(1, 3, 1, 1) + rest
    found = ptqd.correction(one_step(exact, quantized))
    torch.testing.assert_close(1 / found.scale[0] - 1, torch.full((3,), k), atol=2e-3, rtol=0)
    torch.testing.assert_close(-found.bias[0] / found.scale[0], bias, atol=5e-3, rtol=0)
    torch.testing.assert_close(
        found.variance[0].sqrt(), torch.full((3,), spread / (1 + k)), atol=2e-3, rtol=0
    )
    corrected = found(quantized, torch.zeros(64, dtype=torch.long))
    torch.testing.assert_close(corrected - exact, rest / (1 + k), atol=2e-2, rtol=0)


def test_a_negative_correlation_is_corrected_by_one_and_not_by_the_other() -> None:
    exact = noise(32, 2, 16, 16)
    quantized = 0.7 * exact + 0.05 * noise(*exact.shape, seed=1)
    moments, places = one_step(exact, quantized), torch.zeros(32, dtype=torch.long)
    assert torch.equal(ptqd.correction(moments).scale, torch.ones(1, 2))
    found = d2dpm.correction(moments)
    before = (quantized - exact).square().mean()
    after = (found(quantized, places) - exact).square().mean()
    assert after < 0.1 * before
    assert (found.scale > 1.2).all()


@pytest.mark.parametrize("channelwise", [True, False])
def test_the_conditional_mean_is_the_least_squares_line(channelwise: bool) -> None:
    exact = noise(16, 2, 8, 8)
    gains = torch.tensor([0.9, 1.3]).reshape(1, 2, 1, 1)
    quantized = gains * exact + 0.2 + 0.1 * noise(*exact.shape, seed=1)
    found = d2dpm.correction(one_step(exact, quantized), channelwise)
    for channel in range(2):
        part = slice(channel, channel + 1) if channelwise else slice(None)
        x, y = quantized[:, part].flatten().double(), exact[:, part].flatten().double()
        line = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution.flatten()
        assert found.scale[0, channel].item() == pytest.approx(line[0].item(), rel=1e-5)
        assert found.bias[0, channel].item() == pytest.approx(line[1].item(), abs=1e-5)
        left = (y - line[0] * x - line[1]).var(correction=0)
        assert found.variance[0, channel].item() == pytest.approx(left.item(), rel=1e-4)


def test_a_correction_of_no_error_changes_nothing() -> None:
    exact = noise(8, 3, 4, 4)
    for correct in (ptqd.correction, d2dpm.correction):
        found = correct(one_step(exact, exact))
        torch.testing.assert_close(found.scale, torch.ones(1, 3))
        torch.testing.assert_close(found.bias, torch.zeros(1, 3))


def test_the_factor_is_the_least_of_its_loss() -> None:
    """Against a search over K of the loss as the paper writes it."""
    exact, quantized = noise(1, 1, 6, 6), 0.8 * noise(1, 1, 6, 6) + 0.05 * noise(1, 1, 6, 6, seed=1)
    relative, unit = 0.3, 0.2
    found = tac.factor(quantized, exact, relative, unit, guard=1e-9)
    q, e = quantized.double().flatten(), exact.double().flatten()
    candidates = torch.linspace(found.item() - 0.5, found.item() + 0.5, 20001, dtype=torch.float64)
    scaled = candidates[:, None] * q
    losses = (
        (1 - relative) * (scaled - e).square().sum(1)
        + relative * len(e) * (scaled / e - 1).square().sum(1)
        + unit * len(e) * (candidates - 1).square()
    )
    assert candidates[losses.argmin()].item() == pytest.approx(found.item(), abs=1e-4)


def test_predictions_near_zero_do_not_decide_the_factor() -> None:
    exact, quantized = noise(1, 1, 8, 8), 0.9 * noise(1, 1, 8, 8)
    spoiled = exact.clone()
    spoiled[0, 0, 0, 0] = 1e-12
    sound = tac.factor(quantized, exact, 0.8, 0.0, guard=0.1)
    guarded = tac.factor(quantized, spoiled, 0.8, 0.0, guard=0.1)
    bare = tac.factor(quantized, spoiled, 0.8, 0.0, guard=1e-30)
    assert abs(guarded - sound).item() < 0.02
    assert abs(bare - sound).item() > 0.5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_shift_brings_the_mean_of_the_next_state_back(prediction: str, clip: bool) -> None:
    """Against the mean after the scheduler's own step; with clipping its answer is no line."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=clip)
    scheduler.set_timesteps(10)
    x, predicted = noise(8, 3, 8, 8), 0.9 * noise(8, 3, 8, 8) + 0.1 * noise(8, 3, 8, 8, seed=1)
    wanted_shift = torch.tensor([0.05, -0.1, 0.0])
    for t in scheduler.timesteps:
        step = partial(try_step, scheduler, t, x)
        wanted = step(predicted + wanted_shift.reshape(1, 3, 1, 1))
        found = offset_of(step, predicted, wanted)
        after = step(predicted + found.float().reshape(1, 3, 1, 1))
        before = (wanted - step(predicted)).mean((0, 2, 3)).abs()
        left = (wanted - after).mean((0, 2, 3)).abs()
        assert (left <= before * 0.1 + 1e-6).all()
        if not clip:
            torch.testing.assert_close(found.float(), wanted_shift, atol=1e-4, rtol=1e-3)


def test_one_step_of_following_is_the_closed_form(source: Source) -> None:
    """With one step, the factor is that of the first prediction and the bias brings the mean state back."""
    denoiser = Denoiser.of(source.pipeline)
    worse = Denoiser(copy.deepcopy(denoiser.model))
    with torch.no_grad():
        worse.model.conv_out.weight.mul_(0.8)
        worse.model.conv_out.bias.mul_(0.8).add_(0.3)
    source.pipeline.scheduler = DDIMScheduler(clip_sample=False)
    single = Source(source.pipeline, Sampling(1), seed=source.seed, cache=source.cache)
    found, table = follow(denoiser, worse, single, 4, lambda q, e: torch.full((3,), 1.25).double(), True)
    assert len(table.times) == 1
    torch.testing.assert_close(found.scale, torch.full((1, 3), 1.25))
    torch.testing.assert_close(found.bias, torch.full((1, 3), -0.375), atol=1e-4, rtol=1e-3)


def test_following_brings_the_mean_of_the_states_back(source: Source) -> None:
    denoiser = Denoiser.of(source.pipeline)
    worse = Denoiser(copy.deepcopy(denoiser.model))
    with torch.no_grad():
        worse.model.conv_out.bias.add_(0.2)
    source.pipeline.scheduler = DDIMScheduler(clip_sample=False)
    five = Source(source.pipeline, Sampling(5), seed=source.seed, cache=source.cache)
    found, _ = follow(denoiser, worse, five, 4, lambda q, e: torch.ones(3).double(), True)
    torch.testing.assert_close(found.bias, torch.full((5, 3), -0.2), atol=5e-3, rtol=0)


def test_a_deterministic_sampler_refuses_the_variance(source: Source) -> None:
    source.pipeline.scheduler = DDIMScheduler()
    with pytest.raises(MethodError, match="no noise that could absorb"):
        check_noise(source, "absorb")
    assert check_noise(source, "auto") == "none"
    noisy = Source(source.pipeline, Sampling(10, "ddpm"), cache=source.cache)
    assert check_noise(noisy, "auto") == "absorb"
    for sampling in (Sampling(10, "ddim-eta1"), Sampling(10, prompts=(Call.of({"eta": 0.5}),))):
        assert check_noise(dataclasses.replace(source, sampling=sampling), "auto") == "absorb"
    assert (
        check_noise(dataclasses.replace(source, sampling=Sampling(10, prompts=(Call.of({}),))), "auto")
        == "none"
    )


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++", "unipc"])
def test_what_a_noisy_schedule_leaves_in_the_configuration_is_no_noise(source: Source, sampler: str) -> None:
    source.pipeline.scheduler = DDPMScheduler()
    chosen = Source(source.pipeline, Sampling(5, sampler), cache=source.cache)
    assert check_noise(chosen, "auto") == "none"
    denoiser = Denoiser.of(source.pipeline)
    found, _ = follow(denoiser, denoiser, chosen, 2, lambda q, e: torch.ones(3).double(), True)
    assert found.bias.abs().max() < 1e-3


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_a_sampler_that_cannot_carry_the_bias_is_named(source: Source, kind: type) -> None:
    source.pipeline.scheduler = kind()
    denoiser = Denoiser.of(source.pipeline)
    with pytest.raises(MethodError, match="cannot be told from the noise"):
        follow(denoiser, denoiser, source, 2, lambda q, e: torch.ones(3).double(), True)


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_noisy_trajectories_meet_the_same_noise(source: Source, kind: type) -> None:
    source.pipeline.scheduler = kind()
    denoiser = Denoiser.of(source.pipeline)
    gaps: list[float] = []

    def factor(quantized: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        gaps.append(float((quantized - exact).abs().max()))
        return quantized.double().mean((0, 2, 3))

    first, second = (follow(denoiser, denoiser, source, 2, factor, False)[0] for _ in range(2))
    assert max(gaps) == 0
    assert torch.equal(first.scale, second.scale)


def test_times_are_those_that_the_network_receives(source: Source) -> None:
    scheduler = source.pipeline.scheduler
    scheduler.set_timesteps(source.sampling.steps)
    assert torch.equal(source.times(), scheduler.timesteps)
    assert len(StepTable.of(source.times()).times) == source.sampling.steps
