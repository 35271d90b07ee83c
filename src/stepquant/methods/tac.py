"""Timestep-aware correction: a factor per step and channel, and the bias of the input (arXiv:2407.03917).

Corrects what another method made: `--method eda_dm+tac`. The authors' code is not public. Differs from the paper:
- the factor compares both networks in the state that the quantized one is in; against the exact trajectory's
  prediction it would shrink with every step by which the two have drifted apart.
- the factor holds for a whole channel; a mask over large predictions would not be affine.
- the relative error has no share unless asked for: noise in it pulls every factor below 1 and ruins the image.
- pixels whose exact prediction is near zero do not enter the relative error, which has no meaning there.
- the bias of the next input is reached through the prediction, so that it needs no other place in the sampler.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from stepquant.calib.record import Source
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.fit.correct import follow
from stepquant.methods.correction import Correction
from stepquant.models.denoiser import Denoiser


class TAC(Correction):
    """Noise estimation reconstruction and input bias correction, step behind corrected step."""

    samples: int = Field(32, ge=2, description="trajectories that are followed")
    relative: float = Field(
        0.0, ge=0, lt=1, description="lambda1: share of the relative error in the loss; 0.8 elsewhere"
    )
    unit: float = Field(0.0, ge=0, description="lambda2: pull of the factor to 1; 0.1 elsewhere")
    guard: float = Field(
        0.1,
        gt=0,
        description="exact predictions below this share of their root mean square have no relative error",
    )
    bias: bool = Field(True, description="bring the mean of the states back too (input bias correction)")

    def __call__(
        self, denoiser: Denoiser, quantized: Denoiser, source: Source
    ) -> tuple[StepCorrection, StepTable]:
        # Recurrently: each step is fitted on the trajectory that the steps before it have corrected.
        chosen = partial(factor, relative=self.relative, unit=self.unit, guard=self.guard)
        return follow(denoiser, quantized, source, self.samples, chosen, self.bias)


def factor(quantized: Tensor, exact: Tensor, relative: float, unit: float, guard: float) -> Tensor:
    """K of each channel that minimises, per sample, and then on average,

    (1 - l1) |K q - e|^2 + l1 N |K q / e - 1|^2 + l2 N (K - 1)^2, where N counts the elements of a sample.
    """
    q, e = (x.double().flatten(2) for x in (quantized, exact))
    count = q.shape[1] * q.shape[2]
    sound = e.abs() > guard * e.square().mean((1, 2), keepdim=True).sqrt()
    ratio = torch.where(sound, q / torch.where(sound, e, 1.0), 0.0)
    upper = (1 - relative) * (q * e).sum(2) + relative * count * ratio.sum(2) + unit * count
    lower = (1 - relative) * q.square().sum(2) + relative * count * ratio.square().sum(2) + unit * count
    return (upper / lower.clamp(min=1e-12)).mean(0)
