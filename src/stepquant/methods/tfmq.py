"""TFMQ-DM: the time-information block fitted apart, ranges for every interval of steps (arXiv:2311.16503).

Differs from the released code:
- intervals share out all steps of the sampler, and the row of a call is found by the exact bits of its t.
- the exact table of the time block's outputs, the cache of arXiv:2407.19547, is a field instead of a choice per layer.
- where t enters by modulation there is no block to fit apart: what t alone decides is tabled. Modulation that a class
  or a text enters, too, keeps its layers, which are learnt with their blocks.
- grids come from the plan; most schemes keep the inputs of the time block in float, so that it has no ranges to set.
- fast preset: a block is done when its soft and hard losses agree, and small blocks have more iterations than large ones.
- a block keeps rounding to nearest where that does better on held-out records.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.calibset import CalibSet
from stepquant.calib.record import Source
from stepquant.core.steps import StepTable
from stepquant.fit.streams import Streams
from stepquant.fit.time_alone import has_row_for_each, table_time
from stepquant.fit.time_block import (
    ROLES,
    adds_to_time,
    has_time_block,
    reconstruct_time,
    time_chains,
    time_table,
)
from stepquant.methods.learning import StridedMethod
from stepquant.models.blocks.structure import Structure
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan, Rule

TABLED = Rule(None, "a table holds what comes out for every t", ROLES, optional=True)
MODULATED = "t enters this model by modulation: a table of what t alone decides takes the place of its layers"


class TFMQ(StridedMethod):
    """Temporal feature maintenance: time block apart, activation ranges per interval of steps."""

    paper: ClassVar[dict[str, Any]] = {
        "trajectories": 256,
        "range_trajectories": 256,
        "batch": 32,
        "iterations": 20000,
        "time_iterations": 20000,
        "rounding_rate": 1e-3,
        "last_rate": 1.0,
        "penalty": 0.01,
        "gap": 0.0,
        "by_size": 0.0,
    }
    time: Literal["reconstruct", "table"] = Field(
        "reconstruct", description="fit the time block apart (TIAR), or store its exact outputs for every t"
    )
    by_step: Literal["auto", "always", "never"] = Field(
        "always", description="activation ranges by step (FSC); auto: where one range would not do; never"
    )
    time_iterations: int = Field(500, ge=0, description="for the time block")
    momentum: float = Field(
        0.95, ge=0, lt=1, description="of the moving average of activation ranges over batches"
    )

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        if self.time == "reconstruct" and "time" in self.model_fields_set:
            time_chains(denoiser)  # what was asked for cannot be had: said before anything is recorded

        # The finite set: every t that the sampler feeds to the network, in intervals of neighbours.
        steps = StepTable.of(source.times(), self.intervals)
        data = source.record(self.picks(source.steps))
        chains = self.chains_of(denoiser, data, source)
        table, tabled = None, None
        if chains is None:
            decided = table_time(denoiser, data, steps.times)
            table, tabled = decided.values, decided.shapes
            plan = plan.with_rules([replace(TABLED, roles=("*",), path=path) for path in tabled])
        elif self.time == "table":
            table = time_table(denoiser, chains, steps.times.float())
            plan = plan.with_rules([TABLED])

        only = self.by_steps(denoiser, plan, data, source)["only"]
        with (
            insert(denoiser, plan, steps=steps, only=only) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            reconstruct = self.reconstructing(streams, data, source)
            self.set_weight_ranges(network, source)

            # TIAR: the time block alone, on all of its inputs; it is left as it is from then on.
            if chains is not None and table is None:
                alone = self.schedule(iterations=self.time_iterations)
                reconstruct_time(network, chains, steps.times.float(), alone, source.seed)

            # All other blocks in their order, behind the blocks already reconstructed.
            apart = ROLES if chains is not None else ()
            reconstruct(self.schedule(without=apart), stage="weights", activations=False)

            # FSC: ranges from the records of each interval, moving averages over batches.
            self.set_input_ranges(network, data, source)
            return freeze(network, table, tabled)

    def chains_of(self, denoiser: Denoiser, data: CalibSet, source: Source) -> Structure | None:
        """The layers behind t, where they are a time block that can be fitted or tabled apart."""
        if not has_time_block(denoiser):
            source.progress.note(MODULATED)
            return None
        chains = time_chains(denoiser)
        if self.time == "reconstruct":
            return chains
        alone = not adds_to_time(denoiser) and has_row_for_each(denoiser, data, chains.time_layers())
        return chains if alone else None
