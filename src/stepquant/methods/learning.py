"""Methods that learn from what the float model makes, block by block or all of the network at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from pydantic import Field, model_validator

from stepquant.calib.calibset import CalibSet
from stepquant.calib.guided import State, states_of
from stepquant.calib.pick import Pick, every, strided
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.fit.blocks import reconstruct_blocks
from stepquant.fit.distil import distil
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Schedule
from stepquant.fit.ranges import set_weight_ranges
from stepquant.fit.reconstruct import Report
from stepquant.fit.streams import Streams
from stepquant.methods.method import PresetMethod
from stepquant.quant.insert import Inserted


class Reconstruct(Protocol):
    def __call__(
        self, schedule: Schedule, *, stage: str, activations: bool, **options: Any
    ) -> list[Report]: ...


class Distil(Protocol):
    def __call__(self, schedule: Schedule, *, stage: str) -> Report: ...


def states_here(wanted: bool, data: CalibSet, source: Source) -> Sequence[State]:
    """What the sampler reads, where that is wanted; a pipeline that guides nothing says so."""
    if not wanted:
        return ()
    states = states_of(data, source)
    if len(states) == len(data):
        source.progress.note(
            "no guidance in this pipeline, by which guided=true would learn: learnt by every prediction"
        )
    return states


ENOUGH_RECORDS, ENOUGH_STEPS = 64, 5  # of what is learnt from; see docs/methods.md, "Few records"


def say_few(data: CalibSet, source: Source) -> None:
    """What is lost where a method learns from less than was enough where it was measured."""
    steps = len(data.steps().unique())
    if len(data) < ENOUGH_RECORDS:
        source.progress.note(
            f"few records to learn from, {len(data)}: 16 instead of {ENOUGH_RECORDS} made brecq at w4a8 err 6 to 34 % more on "
            f"stepquant:characters; --samples {ENOUGH_RECORDS} or more"
        )
    if steps < ENOUGH_STEPS:
        source.progress.note(
            f"few steps to learn from, {steps}: two made brecq at w4a8 err a tenth more on stepquant:characters; "
            f"--steps {ENOUGH_STEPS} or more"
        )


class LearningMethod(PresetMethod):
    """A method that learns by gradient from what the float model makes; ranges minimise a p-norm."""

    iterations: int = Field(300, ge=0, description="per block")
    batch: int = Field(16, gt=0, description="records per iteration")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")
    bf16: bool = Field(
        True,
        description="multiply in bfloat16 while learning, where the processor can; results are judged in float32",
    )

    def through_rounding(self, **rates: Any) -> Schedule:
        """How weights and scales are learnt through their rounding, at these rates."""
        own = {"iterations": self.iterations, "batch": self.batch, "bf16": self.bf16}
        return Schedule(**own | {"rounding_rate": 0, "penalty": 0} | rates)

    def journal(self, streams: Streams, data: CalibSet, source: Source) -> Journal:
        """Of these settings."""
        settings = {"method": type(self).__name__} | self.model_dump()
        return Journal(source.cache, streams.network, data, settings)

    def reconstructing(self, streams: Streams, data: CalibSet, source: Source) -> Reconstruct:
        """Reconstruction of all blocks, kept in a journal."""
        say_few(data, source)
        journal = self.journal(streams, data, source)
        return partial(
            reconstruct_blocks, streams, journal=journal, seed=source.seed, progress=source.progress
        )

    def set_weight_ranges(self, network: Inserted, source: Source) -> None:
        set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)

    def set_input_ranges(self, network: Inserted, data: CalibSet, source: Source) -> None:
        self.measure_inputs(network, data, source, partial(lp_search_binned, p=self.p))


class BlockMethod(LearningMethod):
    """A method that reconstructs blocks by learning to round, with the fields that all of them have."""

    iterations: int = Field(300, ge=0, description="per block, for roundings")
    rounding_rate: float = Field(0.1, ge=0, description="Adam's rate for roundings")
    last_rate: float = Field(0.1, ge=0, le=1, description="share of that rate left at the end of its cosine")
    penalty: float = Field(1.0, ge=0, description="lambda: weight of the rounding regulariser")
    gap: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="a block is done once rounding for good changes its loss by this share; 0: never",
    )
    by_size: float = Field(
        0.25,
        ge=0,
        le=1,
        description="blocks of few weights get more iterations, by this power of the ratio to the mean; 0: all the same",
    )

    def schedule(self, **changes: Any) -> Schedule:
        """How roundings are learnt, with these changes."""
        own = {
            "iterations": self.iterations,
            "batch": self.batch,
            "rounding_rate": self.rounding_rate,
            "last": self.last_rate,
            "penalty": self.penalty,
            "gap": self.gap,
            "by_size": self.by_size,
            "bf16": self.bf16,
        }
        return Schedule(**own | changes)


class DistillingMethod(LearningMethod):
    """A method that learns what the whole network predicts in float, with the fields that all of them have."""

    along: float = Field(
        0.0, ge=0, description="how much more an error counts that makes what is predicted smaller or larger"
    )
    guided: bool = Field(
        False, description="learn by what guidance makes of two predictions, which the sampler reads, too"
    )
    step_rate: float = Field(
        2e-3, ge=0, description="Adam's rate for activation steps, relative to each step"
    )

    def distilling(self, streams: Streams, data: CalibSet, source: Source) -> Distil:
        """Learning of all of the network at once, kept in a journal."""
        return partial(
            distil,
            streams,
            journal=self.journal(streams, data, source),
            seed=source.seed,
            progress=source.progress,
            states=states_here(self.guided, data, source),
        )


class StridedMethod(BlockMethod):
    """A block method whose records are whole trajectories, each at the same steps."""

    samples: int | None = Field(
        None,
        gt=0,
        description="calibration records, at least, in place of trajectories: as many as give them",
    )
    trajectories: int = Field(32, gt=0, description="n: trajectories, each recorded at every chosen step")
    at_steps: int = Field(20, gt=0, description="how many steps are chosen, at equal distances")

    @model_validator(mode="before")
    @classmethod
    def check_said_once(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get("samples") is not None and "trajectories" in fields:
            raise ValueError("samples and trajectories both say how many records there are: give one of them")
        return fields

    def picks(self, steps: int) -> tuple[Pick, ...]:
        """Of a sampler with so many steps."""
        chosen = strided(steps, self.at_steps)
        few = self.trajectories if self.samples is None else math.ceil(self.samples / len(chosen))
        return every(few, chosen)
