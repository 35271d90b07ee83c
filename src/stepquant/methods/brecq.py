"""BRECQ: roundings learnt block by block (arXiv:2102.05426), the baseline under the other reconstruction methods.

Differs from the paper and its released code:
- the block error is not weighted by the Fisher diagonal: a denoiser has no task loss, its target is its own output.
- activation steps are learnt as factors of their start, so that one rate fits every site.
- a block keeps rounding to nearest where that does better on held-out records.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field

from stepquant.artifact import Artifact, freeze
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.fit.blocks import reconstruct_blocks
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Schedule
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.fit.streams import Streams
from stepquant.methods.method import PresetMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class BRECQ(PresetMethod):
    """Block reconstruction of weights, then of activation steps, on uniformly drawn time steps."""

    paper: ClassVar[dict[str, Any]] = {
        "samples": 1024,
        "iterations": 20000,
        "step_iterations": 5000,
        "rounding_rate": 1e-3,
        "last_rate": 1.0,
        "penalty": 0.01,
        "step_rate": 4e-5,
    }
    samples: int = Field(512, ge=16, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    iterations: int = Field(300, ge=0, description="per block, for roundings")
    step_iterations: int = Field(40, ge=0, description="per block, for activation steps")
    batch: int = Field(32, gt=0, description="records per iteration")
    rounding_rate: float = Field(0.05, ge=0, description="Adam's rate for roundings")
    step_rate: float = Field(
        1e-3, ge=0, description="Adam's rate for activation steps, relative to each step"
    )
    last_rate: float = Field(
        0.1, ge=0, le=1, description="share of the rates for roundings left at the end of their cosine"
    )
    penalty: float = Field(1.0, ge=0, description="lambda: weight of the rounding regulariser")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of the moving average of activation ranges over batches"
    )

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        with insert(denoiser, plan) as network, Streams(network, data, source.cache) as streams:
            journal = Journal(source.cache, network, data, {"method": "brecq"} | self.model_dump())
            reconstruct = partial(
                reconstruct_blocks, streams, journal=journal, seed=source.seed, progress=source.progress
            )
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)

            # Eq. 10: each block's output error, behind the blocks already reconstructed; activations are float.
            schedule = Schedule(
                self.iterations, self.batch, self.rounding_rate, last=self.last_rate, penalty=self.penalty
            )
            reconstruct(schedule, stage="weights", activations=False)

            # Activations follow: ranges first, then their steps by gradient (section 3.3).
            search = partial(lp_search_binned, p=self.p)
            set_input_ranges(network, data, search, momentum=self.momentum, progress=source.progress)
            schedule = Schedule(self.step_iterations, self.batch, rounding_rate=0, step_rate=self.step_rate)
            reconstruct(schedule, stage="steps", activations=True)
            return freeze(network)
