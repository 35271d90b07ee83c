"""ViDiT-Q: scales by the token, channels balanced by factors and by rotation (arXiv:2406.02540).

Differs from paper and code:
- scales of tokens are symmetric, as kernels have them; the paper's have a zero point each.
- rotation is by regular Hadamard matrices in groups of at most 256 channels, not over the full width; a width that no
  group divides stays as it is, and is listed.
- the greatest inputs are averaged over all records of the first steps, not by a moving average over batches.
- bits are those of the plan. `--scheme auto-N` gives each layer its own, by one measure for all; the paper measures text,
  image and motion apart. Other bits in other phases of the trajectory cannot be had: weights are stored once.
- convolutions, products of attention, and the layers that the plan keeps float or by groups stay as other methods have them.
- ranges of weights minimise a p-norm, as in the other methods here, instead of covering every weight.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import every, spread, uniform
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.fit.channels import (
    balance_channels,
    by_token,
    greatest_inputs,
    read_by_token,
    rotate_channels,
)
from stepquant.fit.ranges import set_weight_ranges
from stepquant.methods.method import ONE_RANGE, RangedMethod, UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import ENDS, TEXTS, TIMES

WITHOUT = (*TIMES, *TEXTS, *ENDS)  # embeddings, modulation and the last layer


class ViDiTQ(RangedMethod, UnbiasedMethod):
    """Scales by the token; lasting outliers of channels by factors of the first steps, the others by rotation."""

    samples: int = Field(
        256, gt=0, description="calibration records, for activations that keep a range of their own"
    )
    trajectories: int = Field(32, gt=0, description="trajectories that the records come from")
    initial: int = Field(5, gt=0, description="first steps of the sampler, which show the lasting outliers")
    balance: bool = Field(True, description="multiply each channel by a factor")
    alpha: float = Field(
        0.3, ge=0, le=1, description="how much of the unevenness moves from inputs into weights"
    )
    group: Literal[0, 4, 16, 64, 256] = Field(
        256, description="channels that are rotated together, at most; 0: none are"
    )
    batch: int = Field(32, gt=0, description="records per forward pass")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        # Activations of linears get the scale of each token as it comes; only the others have ranges to measure.
        plan, data = by_token(denoiser, plan, WITHOUT), None
        if self.corrected or plan.has_ranges(denoiser):
            generator = torch.Generator().manual_seed(source.seed)
            data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))
        first = source.record(every(self.trajectories, range(min(self.initial, source.steps))))

        steps = ONE_RANGE if data is None else self.by_steps(denoiser, plan, data, source)
        with insert(denoiser, plan, **steps) as network:
            layers = read_by_token(network, WITHOUT)

            # Static unevenness, X diag(1/s) diag(s) W with s = max |X|^alpha / max |W|^(1 - alpha) of the first steps.
            if self.balance:
                found = greatest_inputs(network, layers, first, self.batch, source.progress)
                balance_channels(layers, found, self.alpha)

            # What changes with the step is spread over all channels, (X H) (H W).
            left = rotate_channels(layers, self.group)
            if self.group and left:
                source.progress.note(f"no group divides the widths of {', '.join(left)}: not rotated")

            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)
            if data is not None:
                search = partial(lp_search_binned, p=self.p)
                self.measure_inputs(network, data, source, search, self.batch)
            return self.finish(network, data, source, self.batch)
