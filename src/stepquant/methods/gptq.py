"""GPTQ: weights rounded column by column, errors made good by those still free (arXiv:2210.17323).

Differs from the paper, which is about linear layers of language models:
- a convolution is a linear over its patches; a layer over a skip concatenation may be split as other methods do.
- the Hessian is the mean over the denoising trajectory, behind layers that are already rounded.
- ranges of weights minimise a p-norm, as in the other methods here, instead of covering every weight.
- activations are quantized too, with ranges set behind the rounded weights.
- inputs that are always zero leave their weights at the nearest integers; the code sets these weights to 0.
- a block keeps rounding to nearest where that does better on held-out records.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.fit.blocks import fit_blocks
from stepquant.fit.compensate import Compensation, compensate_block
from stepquant.fit.correct_bias import correct_products
from stepquant.fit.journal import Journal
from stepquant.fit.ranges import set_weight_ranges
from stepquant.fit.streams import Streams
from stepquant.methods.method import RangedMethod, UnbiasedMethod, split_here
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class GPTQ(RangedMethod, UnbiasedMethod):
    """Layer-wise rounding with second-order compensation, in execution order; nothing is learnt."""

    samples: int = Field(256, ge=16, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    damping: float = Field(0.01, ge=0, le=1, description="share of the mean diagonal added to the Hessian")
    block: int = Field(128, gt=0, description="columns rounded between updates of all the rest")
    act_order: bool = Field(False, description="round columns in order of their diagonal, greatest first")
    split: bool = Field(False, description="quantize the two halves of a skip concatenation apart")
    softmax: bool = Field(
        False,
        description="afterwards add to quantized attention probabilities what they lack on average (SBC)",
    )
    batch: int = Field(32, gt=0, description="records per forward pass")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        split = split_here(self.split, "split" in self.model_fields_set, denoiser, source)
        steps = self.by_steps(denoiser, plan, data, source, split)
        with (
            insert(denoiser, plan, split=split, **steps) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            journal = Journal(source.cache, network, data, {"method": "gptq"} | self.model_dump())
            fit = partial(fit_blocks, streams, journal=journal, seed=source.seed, progress=source.progress)
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)

            # Algorithm 1, layer by layer: the Hessian of each comes from inputs behind the rounded layers.
            settings = Compensation(self.damping, self.block, self.act_order, self.batch)
            fit(partial(compensate_block, network, settings=settings), stage="weights", activations=False)

            # Activations follow, then what is left of the mean error.
            search = partial(lp_search_binned, p=self.p)
            self.measure_inputs(network, data, source, search, self.batch)
            if self.softmax:
                probe = partial(correct_products, network, batch=self.batch)
                fit(probe, stage="probabilities", activations=True)
            if self.corrected:
                self.correct(streams, journal, source, self.batch)
            return freeze(network)
