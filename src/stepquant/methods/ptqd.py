"""PTQD: the correlated part, the bias and the variance of the quantization noise (arXiv:2305.10657).

Corrects what another method made: `--method eda_dm+ptqd`. Differs from the released code:
- the bias is that of the error without its correlated part, as the paper has it; the code takes the whole error's.
- statistics are taken before guidance is applied, over all of its branches.
- the variance goes into the sampler's noise where the sampler has any (DDPM, and DDIM with eta > 0); others refuse it.
- activation bits do not change from step to step.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.fit.correct import Moments, check_noise, measure
from stepquant.methods.correction import Correction
from stepquant.models.denoiser import Denoiser


class PTQD(Correction):
    """Corrects the correlated part and the bias of the noise; a noisy sampler absorbs its variance."""

    trajectories: int = Field(32, gt=0, description="float trajectories that errors are measured on")
    variance: Literal["auto", "none", "absorb"] = Field(
        "auto", description="let the sampler's own noise absorb the variance; auto: where it has any"
    )

    def __call__(
        self, denoiser: Denoiser, quantized: Denoiser, source: Source
    ) -> tuple[StepCorrection, StepTable]:
        noise = check_noise(source, self.variance)
        # Errors at every step of the float trajectory.
        table = StepTable.of(source.times())
        data = source.record(every(self.trajectories, range(source.steps)))
        moments = measure(denoiser, quantized, data, table, source.progress)
        return correction(moments, noise), table


def correction(moments: Moments, noise: str = "none") -> StepCorrection:
    """From moments (steps, channels)."""
    pooled, channels = moments.pooled(), moments.exact.shape[1]

    # Correlated part: e = k eps + e'; k by least squares over all channels, never negative.
    k = (pooled.covariance / pooled.exact_variance.clamp(min=1e-12) - 1).clamp(min=0)

    # Uncorrelated part: the bias of e', channel by channel.
    bias = moments.error - k * moments.exact

    # Corrected: eps = (eps_q - b) / (1 + k), and what is left has the variance of e' / (1 + k)^2.
    shared = moments.covariance - moments.exact_variance
    rest = (moments.error_variance - 2 * k * shared + k**2 * moments.exact_variance).clamp(min=0)
    left = rest.mean(1, keepdim=True) / (1 + k) ** 2
    scale = (1 / (1 + k)).expand(-1, channels)
    return StepCorrection(scale.float(), (-bias * scale).float(), left.expand(-1, channels).float(), noise)
