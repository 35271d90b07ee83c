"""AdaTSQ: bits of activations by layer and step, and GPTQ whose records weigh as their steps count (arXiv:2602.09883).

Differs from the paper, whose code is not out:
- bits are those of activations: weights are stored once, with the bits of the plan.
- a loss is the error of a layer's output times Fisher information, and all losses are added: the allocation is then a
  knapsack, solved exactly. The paper searches with a beam through the steps, by the error of what the sampler returns.
- Fisher information is that of the outputs of each layer where a prediction has Gaussian noise, by a random direction for
  every record; of each step beside the mean of all.
- neighbouring steps share ranges and bits, as elsewhere here.
- products of attention keep the bits of the plan; schemes with 8 bits have nothing to share out.
- ranges minimise a p-norm; a block keeps rounding to nearest where that does better on held-out records.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from stepquant.artifact import Artifact
from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.core.steps import StepTable
from stepquant.fit.bits_by_step import Question, share_out_bits, stepped
from stepquant.fit.blocks import fit_blocks
from stepquant.fit.compensate import Compensation, compensate_block
from stepquant.fit.fisher import information, relative
from stepquant.fit.journal import Journal
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.fit.streams import Streams
from stepquant.methods.method import Method
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import Inserted, insert
from stepquant.quant.plan import Plan

WIDTHS = (3, 4, 5, 6, 8)


class AdaTSQ(Method):
    """Steps that a prediction depends on most get the bits of activations, and decide how weights are rounded."""

    samples: int = Field(256, ge=16, description="calibration records, as many of every step")
    intervals: int = Field(
        20, gt=0, description="groups of neighbouring steps with ranges and bits of their own"
    )
    states: int = Field(
        4, gt=0, description="records of each group on which errors of fewer bits are measured"
    )
    bits: bool = Field(True, description="share out the bits of activations over layers and steps")
    fisher: bool = Field(True, description="weigh records by their steps where weights are rounded")
    damping: float = Field(0.01, ge=0, le=1, description="share of the mean diagonal added to the Hessian")
    block: int = Field(128, gt=0, description="columns rounded between updates of all the rest")
    batch: int = Field(32, gt=0, description="records per forward pass")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the moving average of ranges over batches")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        data = source.record(every(math.ceil(self.samples / source.steps), range(source.steps)))
        table = StepTable.of(source.times(), self.intervals)
        search = partial(lp_search_binned, p=self.p)
        ranged = table if plan.has_ranges(denoiser) else None

        with (
            insert(denoiser, plan, steps=ranged) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            # Temporal Fisher information I(t, l) of every layer and step.
            generator = torch.Generator().manual_seed(source.seed)
            told = information(network, data, table, self.batch, generator, source.progress)

            # Bit-widths b(t, l) of least loss with the average of the plan.
            if self.bits and stepped(network):
                question = Question(WIDTHS, search, self.states)
                bits = share_out_bits(network, stepped(network), data, table, told, question, source.progress)
                set_bits(network, bits)

            # H'(l) = sum over t of alpha(t, l) X X^T, alpha the information of a step beside the mean.
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)
            settings = Compensation(self.damping, self.block, batch=self.batch)
            weights = weights_of(data, table, told) if self.fisher else None
            fit_blocks(
                streams,
                partial(compensate_block, network, settings=settings, weights=weights),
                Journal(source.cache, network, data, {"method": "adatsq"} | self.model_dump()),
                stage="weights",
                activations=False,
                seed=source.seed,
                progress=source.progress,
            )
            set_input_ranges(
                network,
                data,
                search,
                every_step=data,
                batch=self.batch,
                momentum=self.momentum,
                progress=source.progress,
            )
            return freeze(network)


def set_bits(network: Inserted, bits: dict[str, list[int]]) -> None:
    for path, own in bits.items():
        quantizer = network.layers[path].input_quantizer
        assert quantizer is not None
        quantizer.set_bits(own)


def weights_of(data: CalibSet, table: StepTable, told: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every record for every layer: what its step has beside the mean."""
    times = torch.cat([records.arguments[data.t].reshape(-1) for records in data.batches(256)])
    rows = table.rows_of(times)
    return {path: relative(found)[rows] for path, found in told.items()}
