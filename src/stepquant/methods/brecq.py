"""BRECQ: roundings learnt block by block (arXiv:2102.05426), the baseline under the other reconstruction methods.

Differs from the paper and its released code:
- the block error is not weighted by the Fisher diagonal: a denoiser has no task loss, its target is its own output.
- activation steps are learnt as factors of their start, so that one rate fits every site; published rates are absolute.
- fast preset: a block is done when its soft and hard losses agree, and small blocks have more iterations than large ones.
- a block keeps rounding to nearest where that does better on held-out records.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.fit.streams import Streams
from stepquant.methods.learning import BlockMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class BRECQ(BlockMethod):
    """Block reconstruction of weights, then of activation steps, on uniformly drawn time steps."""

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
    }
    samples: int = Field(512, ge=16, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    step_iterations: int = Field(40, ge=0, description="per block, for activation steps")
    step_rate: float = Field(
        1e-3, ge=0, description="Adam's rate for activation steps, relative to each step"
    )

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        steps = self.by_steps(denoiser, plan, data, source)
        with (
            insert(denoiser, plan, **steps) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            reconstruct = self.reconstructing(streams, data, source)
            self.set_weight_ranges(network, source)

            # Eq. 10: each block's output error, behind the blocks already reconstructed; activations are float.
            reconstruct(self.schedule(), stage="weights", activations=False)

            # Activations follow: ranges first, then their steps by gradient (section 3.3).
            self.set_input_ranges(network, data, source)
            schedule = self.schedule(
                iterations=self.step_iterations, rounding_rate=0, scale_rate=self.step_rate, last=0.0
            )
            reconstruct(schedule, stage="steps", activations=True)
            return freeze(network)
