"""QNCD: what the embedding of the step makes large is smoothed, and the mean of the error that is left taken off (arXiv:2403.19140).

Differs from paper and code:
- below it are roundings and ranges of `brecq`, as the released code wants them for 4 bits; `iterations=0` rounds to nearest.
- factors of channels are not multiplied by the weight of the norm, as the code has it and the paper not; what a norm scales
  by an embedding is smoothed by |1 + scale|, where the code takes the norm of the scale.
- transformer blocks whose norms an embedding scales are smoothed as well; the paper has residual blocks alone.
- the mean error is estimated once, on states of the float trajectory, and stored for every step; the code does it anew for
  every batch, at the price of one more call in ten. While calibrating, the float model is there: what it predicts for a state
  that is noised again takes the place of the noise, so that its own error is none of quantization's.
- estimates below two standard errors of their own are taken for chance; states that no noise takes the place of have none.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepquant.artifact import Artifact
from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import every, spread, uniform
from stepquant.calib.record import Source
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.errors import MethodError
from stepquant.fit.noised_again import NoisedAgain, kept_of
from stepquant.fit.smooth import divide_channels, mean_sizes
from stepquant.fit.streams import Streams
from stepquant.methods.learning import BlockMethod
from stepquant.models.blocks.scaled import ScaledChannels, scaled_channels
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import scheduler_of
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import Inserted, insert
from stepquant.quant.plan import Plan


class QNCD(BlockMethod):
    """Channels divided by what the embedding of the step makes of them; the mean of the error taken off at every step."""

    paper: ClassVar[dict[str, Any]] = {
        "samples": 1024,
        "batch": 32,
        "iterations": 20000,
        "step_iterations": 5000,
        "rounding_rate": 1e-3,
        "last_rate": 1.0,
        "penalty": 0.01,
        "gap": 0.0,
        "by_size": 0.0,
        "step_rate": 4e-5,
        "interval": 10,
    }
    samples: int = Field(512, ge=16, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    smooth: bool = Field(True, description="divide channels by how large the embedding makes them (intra)")
    inter: bool = Field(True, description="take off the mean error of states that are noised again (inter)")
    interval: int = Field(1, gt=0, description="steps that one estimate of the mean error serves")
    step_iterations: int = Field(40, ge=0, description="per block, for activation steps")
    step_rate: float = Field(
        1e-3, ge=0, description="Adam's rate for activation steps, relative to each step"
    )

    @property
    def uncorrected(self) -> str | None:
        return "--set inter=false" if self.inter else None

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        channels = self.channels_of(denoiser, source)
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))
        # Intra: S, how large the embedding makes each channel of a norm's output, averaged over the steps.
        sizes = mean_sizes(denoiser, channels, data, self.batch, source.progress)

        steps = self.by_steps(denoiser, plan, data, source)
        with insert(denoiser, plan, **steps) as network:
            # y = (x / S) (S W), exact in float: what ranges of activations have to cover is what is left.
            divide_channels(network.layers, sizes)
            with Streams(network, data, source.cache, budget=source.memory) as streams:
                reconstruct = self.reconstructing(streams, data, source)
                self.set_weight_ranges(network, source)
                reconstruct(self.schedule(), stage="weights", activations=False)
                self.set_input_ranges(network, data, source)
                schedule = self.schedule(
                    iterations=self.step_iterations, rounding_rate=0, scale_rate=self.step_rate, last=0.0
                )
                reconstruct(schedule, stage="steps", activations=True)

            # Inter: the mean error at every step, on states that are noised again.
            table, errors = StepTable.of(source.times()), self.mean_errors(network, source)
            artifact = freeze(network)
        if not any(errors):
            return artifact
        return artifact.with_correction(
            correction_of(errors, source.times(), table, width_of(denoiser, data)), table
        )

    def channels_of(self, denoiser: Denoiser, source: Source) -> list[ScaledChannels]:
        """Those that the embedding of the step makes large; a model without any is an error where that leaves nothing."""
        found = scaled_channels(denoiser.model) if self.smooth else []
        if found or not self.smooth:
            return found
        if "smooth" in self.model_fields_set or not self.inter or kept_of(source.pipeline.scheduler) is None:
            raise MethodError(
                "no embedding of the step scales, or is added to, what a norm makes in this model",
                where=type(denoiser.model).__name__,
                expected="residual blocks of U-Nets, or transformer blocks whose norms are of the kind of DiT's",
                fix="choose another method, as brecq",
            )
        source.progress.note("no embedding scales what a norm makes in this model: no channel is smoothed")
        return []

    def mean_errors(self, network: Inserted, source: Source) -> list[float]:
        """Of what the quantized network predicts at every step of the sampler."""
        if not self.inter:
            return []
        kept = kept_of(scheduler_of(source.pipeline, source.sampling.sampler))
        if kept is None:
            source.progress.note("states of this sampler cannot be noised again: the mean error stays")
            return []
        data = source.record(every(self.range_trajectories, range(source.steps)))
        again = NoisedAgain(network, data, kept, source.seed, self.batch)
        found = again.mean_errors(source.steps, self.interval, source.progress)
        sure = sum(error != 0 for error in found)
        source.progress.note(f"a mean error is taken off at {sure} of {len(found)} steps")
        return found


def correction_of(errors: list[float], times: Tensor, table: StepTable, channels: int) -> StepCorrection:
    """Less the mean error in all channels, at every t of the table: where t repeats, that of its first step."""
    first = [times.double().tolist().index(t) for t in table.times.tolist()]
    bias = -torch.tensor(errors)[first, None].expand(-1, channels).contiguous()
    return StepCorrection(torch.ones_like(bias), bias, torch.zeros_like(bias))


def width_of(denoiser: Denoiser, data: CalibSet) -> int:
    with torch.no_grad():
        return int(denoiser.predict(data.take([0]).arguments).shape[denoiser.family.channels])
