"""PTQ4DM: calibration on the denoising process at normally distributed time steps (arXiv:2211.15736).

Differs from the released code, which mislabels what it records:
- x and t are recorded together as the network receives them; the code pairs step T-2-t's output with label t.
- t keeps the scale that the sampler feeds; the code calibrates with the respaced index, a quarter of the range.
- levels outside the schedule are drawn again; the code clamps them, which puts 16 % of the mass on the clean end.
- activations are quantized at layer inputs, attention included, so that integer kernels can run; the code
  quantizes layer outputs and leaves attention in float.
- grids come from the plan: zero points for activations, where the code spends half its levels on values that
  never occur after SiLU.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import normal, one_each, single, spread, uniform
from stepquant.calib.record import Source
from stepquant.calib.synthetic import from_images, from_noise
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.fit.ranges import set_weight_ranges
from stepquant.methods.method import RangedMethod, UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class PTQ4DM(RangedMethod, UnbiasedMethod):
    """Normally distributed time-step calibration and least 2.4-norm ranges."""

    samples: int = Field(1024, gt=0, description="N: calibration records")
    trajectories: int = Field(
        1024,
        gt=0,
        description="trajectories that the records come from; as many as samples: one each, as published",
    )
    mean: float = Field(
        0.4, ge=0, le=0.5, description="mean noise level, as fraction of the schedule (mu <= T/2)"
    )
    std: float = Field(0.4, gt=0, le=2, description="standard deviation of the noise level, likewise")
    clamp: bool = Field(
        False, description="move levels outside the schedule to its ends instead of drawing again"
    )
    p: float = Field(2.4, gt=0, le=8, description="norm of the quantization error that ranges minimise")
    batch: int = Field(64, gt=0, description="records per forward pass")
    times: Literal["normal", "uniform", "single"] = Field(
        "normal", description="how steps are drawn (ablation)"
    )
    data: Literal["denoising", "noise", "images", "diffused"] = Field(
        "denoising",
        description="denoising trajectory, pure noise, clean images, or images with noise (ablation)",
    )
    images: str | None = Field(None, description="folder of images, for data=images and data=diffused")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        # Section 3.3: time steps are normally distributed around a mean at or below T/2 (Eq. 15).
        steps = self.draw_steps(source)

        # The float model denoises from pure noise down to each step, and that state is kept.
        data = self.collect(source, steps)

        with insert(denoiser, plan, **self.by_steps(denoiser, plan, data, source)) as network:
            # Eq. 12: ranges of least p-norm error; weights first, per output channel.
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)

            # Activations follow, batch by batch, behind weights and inputs that are already quantized.
            search = partial(lp_search_binned, p=self.p)
            self.measure_inputs(network, data, source, search, self.batch)
            return self.finish(network, data, source, self.batch)

    def draw_steps(self, source: Source) -> torch.Tensor:
        generator = torch.Generator().manual_seed(source.seed)
        if self.times == "uniform":
            return uniform(self.samples, source.steps, generator)
        if self.times == "single":
            return single(self.samples, source.steps, self.mean)
        return normal(self.samples, source.steps, self.mean, self.std, generator, clamp=self.clamp)

    def collect(self, source: Source, steps: torch.Tensor) -> CalibSet:
        if self.data == "denoising":
            few = self.trajectories < self.samples
            return source.record(spread(steps, self.trajectories) if few else one_each(steps))
        if self.data == "noise":
            return from_noise(source, steps)
        return from_images(source, steps, self.images, diffused=self.data == "diffused")
