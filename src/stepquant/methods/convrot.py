"""ConvRot: inputs and weights of linears rotated by regular Hadamard matrices, in groups of channels (arXiv:2512.03673).

Differs from the paper:
- bits are those of the plan, which protects layers by their roles; the paper keeps about a fifth of them in 8 bits.
- a width that no group of 256 divides has the largest one that does, and is listed where there is none.
- linears whose inputs the plan keeps in float are not rotated, nor are those whose weights have scales by the group.
- convolutions and products of attention have no rotation, as in the paper; what the plan quantizes of them gets ranges of
  least p-norm, where the paper leaves them in 16 bits.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search_binned, minmax
from stepquant.fit.channels import by_token, read_by_token, rotate_channels
from stepquant.fit.ranges import set_weight_ranges
from stepquant.methods.method import ONE_RANGE, RangedMethod, UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class ConvRot(RangedMethod, UnbiasedMethod):
    """Every linear reads rotated tokens, each with a scale of its own, and has a rotated weight, rounded to nearest."""

    samples: int = Field(
        256, gt=0, description="calibration records, for activations that keep a range of their own"
    )
    trajectories: int = Field(32, gt=0, description="trajectories that the records come from")
    group: Literal[4, 16, 64, 256] = Field(
        256, description="channels that are rotated together, at most: more spread outliers further"
    )
    batch: int = Field(32, gt=0, description="records per forward pass")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges of other activations minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        # Linears need no data: their inputs have the scale of each token as it comes.
        plan, data = by_token(denoiser, plan), None
        if self.corrected or plan.has_ranges(denoiser):
            generator = torch.Generator().manual_seed(source.seed)
            data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        steps = ONE_RANGE if data is None else self.by_steps(denoiser, plan, data, source)
        with insert(denoiser, plan, **steps) as network:
            # X W^T = (X H) (W H)^T, H of blocks of regular Hadamard matrices: Kronecker powers of H4, whose rows all have
            # the same sum, so that a row of one sign is spread as evenly as a column of outliers.
            left = rotate_channels(read_by_token(network), self.group)
            if left:
                source.progress.note(f"no group divides the widths of {', '.join(left)}: not rotated")

            # Rounding to nearest over the whole range of each output's weights.
            set_weight_ranges(network, minmax, source.progress)
            if data is not None:
                search = partial(lp_search_binned, p=self.p)
                self.measure_inputs(network, data, source, search, self.batch)
            return self.finish(network, data, source, self.batch)
