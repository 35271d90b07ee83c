"""minmax: the naive baseline. Whole ranges, uniformly drawn steps, nearest rounding."""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.ranges import minmax, percentile
from stepquant.fit.ranges import set_weight_ranges
from stepquant.methods.method import ONE_RANGE, RangedMethod, UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class MinMax(RangedMethod, UnbiasedMethod):
    """Ranges from the least and the greatest value, averaged over batches."""

    samples: int = Field(1024, gt=0, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    percent: float = Field(
        100.0, gt=50, le=100, description="share of the values that an activation range covers"
    )
    batch: int = Field(64, gt=0, description="records per forward pass")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        generator = torch.Generator().manual_seed(source.seed)
        data = None
        if self.corrected or plan.has_ranges(denoiser):
            data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))
        else:
            source.progress.note("no activation has a range to measure: nothing is recorded")
        steps = ONE_RANGE if data is None else self.by_steps(denoiser, plan, data, source)
        with insert(denoiser, plan, **steps) as network:
            set_weight_ranges(network, minmax, source.progress)
            if data is None:
                return freeze(network)
            search = minmax if self.percent == 100 else partial(percentile, percent=self.percent)
            self.measure_inputs(network, data, source, search, self.batch)
            return self.finish(network, data, source, self.batch)
