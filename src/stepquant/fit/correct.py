"""Fit what undoes the known part of a quantized model's error, step by step, against the float model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.calib.record import Source, trajectory_seed
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.errors import MethodError
from stepquant.fit.ranges import by_row
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.noise import adds_noise
from stepquant.models.pipelines import unconditional
from stepquant.models.pipelines.registry import kind_of
from stepquant.models.sampling import advance, generators, scheduler_of
from stepquant.progress import Progress

Step = Callable[[Tensor], Tensor]  # prediction -> state after the step


@dataclass(frozen=True)
class Moments:
    """First and second moments of exact and quantized predictions, (steps, channels) each, in float64."""

    exact: Tensor
    quantized: Tensor
    exact_square: Tensor
    quantized_square: Tensor
    product: Tensor

    @classmethod
    def of(cls, exact: Tensor, quantized: Tensor) -> Moments:
        """Of one step's samples (n, channels, ...)."""
        a, b = (x.double().transpose(0, 1).flatten(1) for x in (exact, quantized))
        return cls(*(x.mean(1) for x in (a, b, a * a, b * b, a * b)))

    def pooled(self) -> Moments:
        """The same over all channels together, of which each step then has one."""
        return Moments(*(value.mean(-1, keepdim=True) for value in vars(self).values()))

    @property
    def error(self) -> Tensor:
        """Mean of e = quantized - exact."""
        return self.quantized - self.exact

    @property
    def exact_variance(self) -> Tensor:
        return (self.exact_square - self.exact**2).clamp(min=0)

    @property
    def quantized_variance(self) -> Tensor:
        return (self.quantized_square - self.quantized**2).clamp(min=0)

    @property
    def covariance(self) -> Tensor:
        return self.product - self.exact * self.quantized

    @property
    def error_variance(self) -> Tensor:
        return (self.exact_variance + self.quantized_variance - 2 * self.covariance).clamp(min=0)


def measure(
    denoiser: Denoiser,
    quantized: Denoiser,
    data: CalibSet,
    table: StepTable,
    progress: Progress,
    batch: int = 32,
) -> Moments:
    """Moments of both models' predictions at every step, on the records of that step."""
    found, axis = [], denoiser.family.channels
    for _, records in progress.track(by_row(data, table), "prediction errors", table.groups):
        pairs = []
        with torch.no_grad():
            for part in records.batches(batch):
                pairs.append([model.predict(part.arguments).cpu() for model in (denoiser, quantized)])
        found.append(Moments.of(*(torch.cat(side).movedim(axis, 1) for side in zip(*pairs))))
    return Moments(*(torch.stack(values) for values in zip(*(vars(m).values() for m in found))))


def check_noise(source: Source, wanted: str) -> str:
    """`wanted`, or what the sampler can carry where that is left to us (auto)."""
    scheduler = scheduler_of(source.pipeline, source.sampling.sampler)
    # Noise of the sampler's is spread over channels where images have them.
    asked = [one.arguments.get("eta", 0.0) for one in source.sampling.prompts if isinstance(one, Call)]
    carried = (
        adds_noise(scheduler, min(asked, default=0.0)) and Denoiser.of(source.pipeline).family.channels == 1
    )
    if wanted == "absorb" and not carried:
        raise MethodError(
            "the sampler adds no noise that could absorb the variance of the error",
            got=type(scheduler).__name__,
            fix="--set variance=none for the mean alone, or a sampler with noise: --sampler ddpm or ddim-eta1",
        )
    if wanted != "auto":
        return wanted
    if not carried:
        source.progress.note("no noise of the sampler's can take in the variance of the error: it stays")
    return "absorb" if carried else "none"


def offset_of(step: Step, predicted: Tensor, wanted: Tensor, rounds: int = 4) -> Tensor:
    """What to add to each channel of `predicted` so that the state after the step has the mean of `wanted`.

    The sampler may clip, so that its answer is no line: secants, and the best offset that was seen.
    """

    def gap(offset: Tensor) -> Tensor:
        moved = predicted + by_channel(offset, predicted)
        return (wanted - step(moved)).double().transpose(0, 1).flatten(1).mean(1)

    near = torch.zeros(predicted.shape[1], dtype=torch.float64)
    best, least = near, gap(near)
    far, at_near = near + 1e-2, least
    for _ in range(rounds):
        at_far = gap(far)
        better = at_far.abs() < least.abs()
        best, least = torch.where(better, far, best), torch.where(better, at_far, least)
        change = at_far - at_near
        slope = torch.where(change.abs() > 1e-9, (far - near) / change, 0.0)
        near, at_near, far = far, at_far, far - slope * at_far
    return best


def by_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (like.ndim - 2)).to(like.dtype)


def check_repeats(denoiser: Denoiser, source: Source) -> None:
    """A state can be steered by the prediction only where a step gives the same twice."""
    scheduler = scheduler_of(source.pipeline, source.sampling.sampler, source.sampling.steps)
    x = torch.ones(1, *denoiser.shape)
    if not torch.equal(*(try_step(scheduler, scheduler.timesteps[0], x, x) for _ in range(2))):
        raise MethodError(
            "the bias of the state cannot be told from the noise of this sampler",
            got=type(scheduler).__name__,
            fix="--sampler ddim, or --set bias=false",
        )


def follow(
    denoiser: Denoiser, quantized: Denoiser, source: Source, samples: int, factor: Any, bias: bool
) -> tuple[StepCorrection, StepTable]:
    """Fit along the quantized trajectory, every step behind the corrections of the steps before it.

    `factor(quantized, exact)` is the scale of each channel; with `bias` the mean of the states is brought back too.
    """
    if kind_of(source.pipeline) is not unconditional.KIND:
        raise MethodError(
            "a correction along the quantized trajectory needs an unconditional pipeline",
            fix="choose a correction that is fitted on recorded states, as d2dpm",
        )
    exact, other = (
        scheduler_of(source.pipeline, source.sampling.sampler, source.sampling.steps) for _ in range(2)
    )
    if bias:
        check_repeats(denoiser, source)
    seeds = [trajectory_seed(source.seed, number) for number in range(samples)]
    drawn, again = generators(seeds), generators(seeds)  # both trajectories meet the same noise
    x, y = (
        torch.stack([torch.randn(denoiser.shape, generator=g) for g in noise]) * exact.init_noise_sigma
        for noise in (drawn, again)
    )
    scales, biases = [], []
    for t in source.progress.track(exact.timesteps, "correcting steps", len(exact.timesteps)):
        there = {denoiser.family.x: exact.scale_model_input(x, t), denoiser.family.t: t}
        here = {denoiser.family.x: other.scale_model_input(y, t), denoiser.family.t: t}
        with torch.no_grad():
            wanted, got = denoiser.predict(there).cpu(), quantized.predict(here).cpu()
            scale = factor(got, denoiser.predict(here).cpu())
        corrected = got * by_channel(scale, got)
        offset = torch.zeros_like(scale)
        x = advance(exact, wanted, t, x, drawn)
        if bias:
            trial = partial(try_step, other, t, y)
            offset = offset_of(trial, corrected, x)
            corrected = corrected + by_channel(offset, corrected)
        y = advance(other, corrected, t, y, again)
        scales.append(scale)
        biases.append(offset)
    scale, offset = torch.stack(scales).float(), torch.stack(biases).float()
    return StepCorrection(scale, offset, torch.zeros_like(scale)), StepTable.of(exact.timesteps)


def try_step(scheduler: Any, t: Tensor, x: Tensor, predicted: Tensor) -> Tensor:
    """A step that leaves no trace in the scheduler."""
    return advance(copy.deepcopy(scheduler), predicted, t, x)
