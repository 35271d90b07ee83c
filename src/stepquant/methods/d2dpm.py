"""D2-DPM: the error as a Gaussian given what the quantized network predicts (arXiv:2501.08180).

Corrects what another method made: `--method eda_dm+d2dpm`. Differs from the released code:
- errors beyond four standard deviations count like all others.
- statistics are taken before guidance is applied, over all of its branches.
- the deterministic form leaves the variance out where the sampler has no noise to absorb it, and says so.
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


class D2DPM(Correction):
    """Dual denoising: takes the conditional mean of the error off, and treats its variance as noise."""

    trajectories: int = Field(32, gt=0, description="float trajectories that errors are measured on")
    form: Literal["deterministic", "stochastic"] = Field(
        "deterministic",
        description="D-D2: the sampler's noise absorbs the variance; S-D2: noise is taken off",
    )
    channelwise: bool = Field(True, description="one Gaussian per channel instead of one per tensor")

    def __call__(
        self, denoiser: Denoiser, quantized: Denoiser, source: Source
    ) -> tuple[StepCorrection, StepTable]:
        noise = "sample" if self.form == "stochastic" else check_noise(source, "auto")
        # Pairs of prediction and error at every step of the float trajectory.
        table = StepTable.of(source.times())
        data = source.record(every(self.trajectories, range(source.steps)))
        moments = measure(denoiser, quantized, data, table, source.progress)
        return correction(moments, self.channelwise, noise), table


def correction(moments: Moments, channelwise: bool = True, noise: str = "none") -> StepCorrection:
    """From moments (steps, channels)."""
    channels = moments.exact.shape[1]
    joint = moments if channelwise else moments.pooled()

    # The joint Gaussian of X = eps_q and Y = e: its correlation, of either sign.
    spread = (joint.quantized_variance * joint.error_variance).sqrt().clamp(min=1e-12)
    rho = ((joint.quantized_variance - joint.covariance) / spread).clamp(-0.9999, 0.9999)

    # mu_c = mu_y + rho s_y / s_x (eps_q - mu_x) and s_c = s_y sqrt(1 - rho^2); D-D2 takes mu_c off.
    slope = rho * (joint.error_variance / joint.quantized_variance.clamp(min=1e-12)).sqrt()
    bias = slope * joint.quantized - joint.error
    variance = joint.error_variance * (1 - rho**2)
    scale, bias, variance = (value.expand(-1, channels).float() for value in (1 - slope, bias, variance))
    return StepCorrection(scale, bias, variance, noise)
