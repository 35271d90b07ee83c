"""SVDQuant: what is hard to round goes into a low-rank branch in 16 bits (arXiv:2411.05007).

Differs from paper and code:
- activations have one static scale for each tensor, or one for each token in the `-dynamic` schemes; the paper has
  groups of 64 channels, found as they come, unsigned behind GELU. Weights have scales by channel, not by 64.
- query, key and value are balanced each by itself and have a branch each; the code shares both among the three.
- the factors of the channels multiply the input when it is quantized; they are not folded into the layers before.
- convolutions, products of attention, and the layers that the code leaves out, too, stay as other methods have them.
- output errors are those of single layers, behind layers that are already divided.
- a layer whose output errs no less for it is rounded as ever.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.fit.blocks import fit_blocks
from stepquant.fit.compensate import Compensation, compensate_block
from stepquant.fit.journal import Journal
from stepquant.fit.low_rank import Division, check_divisible, divide_block
from stepquant.fit.ranges import set_weight_ranges
from stepquant.fit.streams import Streams
from stepquant.methods.method import PresetMethod, UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import ENDS, NARROW, TEXTS, TIMES


class SVDQuant(PresetMethod, UnbiasedMethod):
    """Outliers move from activations into weights, and from there into a low-rank branch beside the integers."""

    paper: ClassVar[dict[str, Any]] = {"trajectories": 128, "grid": 20, "rounds": 100, "gptq": True}
    samples: int = Field(128, ge=16, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    rank: int = Field(32, ge=0, le=1024, description="r: directions of the branch; 0: balancing alone")
    grid: int = Field(
        10, ge=0, le=100, description="strengths alpha that are tried; 0: inputs stay as they are"
    )
    rounds: int = Field(5, gt=0, description="branch and rounding in turns, at most")
    gptq: bool = Field(False, description="round what is left for the integers by GPTQ (arXiv:2210.17323)")
    rows: int = Field(2048, gt=0, description="inputs of each layer by which errors are measured")
    batch: int = Field(32, gt=0, description="records per forward pass")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")

    @model_validator(mode="after")
    def check_divides(self) -> Self:
        if not (self.rank or self.grid):
            raise ValueError("rank and grid are both 0: nothing is left of the method")
        return self

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        inputs = partial(lp_search_binned, p=self.p)
        quick = partial(lp_search, p=self.p, candidates=20)  # where ways to divide a layer are compared
        without = (*TIMES, *TEXTS, *ENDS, *NARROW)
        division = Division(quick, inputs, self.rank, self.rounds, self.grid, self.rows, without, self.batch)
        with insert(denoiser, plan) as network:
            check_divisible(network, division)
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        steps = self.by_steps(denoiser, plan, data, source)
        with insert(denoiser, plan, **steps) as network:
            with Streams(network, data, source.cache, budget=source.memory) as streams:
                journal = Journal(source.cache, network, data, {"method": "svdquant"} | self.model_dump())
                fit = partial(
                    fit_blocks,
                    streams,
                    journal=journal,
                    activations=False,
                    seed=source.seed,
                    progress=source.progress,
                )
                set_weight_ranges(network, quick, source.progress)

                # Section 4.2: balance the channels, X diag(1/s) diag(s) W, with the s whose output errs least beside
                # the branch; then branch and residual in turns (appendix): L1 L2 = SVD_r(W - Q(R)), R = W - L1 L2.
                fit(partial(divide_block, network, settings=division), stage="branches")

                set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)

                # The residual is rounded, to nearest or by GPTQ, and activations get their ranges behind it.
                if self.gptq:
                    settings = Compensation(batch=self.batch)
                    fit(partial(compensate_block, network, settings=settings), stage="weights")
                self.measure_inputs(network, data, source, inputs, self.batch)
            return self.finish(network, data, source, self.batch)
