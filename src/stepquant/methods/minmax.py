"""minmax: the naive baseline. Whole ranges, uniformly drawn steps, nearest rounding."""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from stepquant.artifact import Artifact, freeze
from stepquant.calib.pick import one_each, uniform
from stepquant.calib.record import Source
from stepquant.core.ranges import minmax, percentile
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.methods.method import Method
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class MinMax(Method):
    """Ranges from the least and the greatest value, averaged over batches."""

    samples: int = Field(1024, gt=0, description="calibration records, one per trajectory")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the moving average over batches")
    percent: float = Field(
        100.0, gt=50, le=100, description="share of the values that an activation range covers"
    )
    batch: int = Field(64, gt=0, description="records per forward pass")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(one_each(uniform(self.samples, source.steps, generator)))
        with insert(denoiser, plan) as network:
            set_weight_ranges(network, minmax, source.progress)
            search = minmax if self.percent == 100 else partial(percentile, percent=self.percent)
            set_input_ranges(
                network, data, search, batch=self.batch, momentum=self.momentum, progress=source.progress
            )
            return freeze(network)
