"""Method: frozen hyper-parameters and a body in the order of the paper."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from stepquant.artifact import Artifact
from stepquant.calib.calibset import CalibSet
from stepquant.calib.guided import State, states_of
from stepquant.calib.pick import Pick, every, strided
from stepquant.calib.record import Source
from stepquant.core.ranges import SlicedSearch, lp_search, lp_search_binned
from stepquant.core.steps import StepTable
from stepquant.errors import MethodError
from stepquant.fit.blocks import fit_blocks, reconstruct_blocks
from stepquant.fit.correct_bias import correct_block
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Schedule
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.fit.reconstruct import Report
from stepquant.fit.streams import Streams
from stepquant.fit.uneven import described, uneven
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import Inserted, Place
from stepquant.quant.plan import Plan


class Reconstruct(Protocol):
    def __call__(
        self, schedule: Schedule, *, stage: str, activations: bool, **options: Any
    ) -> list[Report]: ...


class Stepping(TypedDict):
    """What `insert` is told of ranges by step."""

    steps: StepTable | None
    only: Collection[Place] | None


ONE_RANGE: Stepping = {"steps": None, "only": {}}


class Method(BaseModel, ABC):
    """Quantizes a denoiser with data from a source; the model is float again afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    calibrates: ClassVar[bool] = True  # False: no record changes what it makes

    @property
    def corrects_steps(self) -> bool:
        """Whether what the network predicts is corrected behind it, at every step."""
        return False

    @abstractmethod
    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact: ...


class RangedMethod(Method):
    """A method that sets ranges of activations: one for all steps, or one for every interval of neighbouring steps."""

    by_step: Literal["auto", "always", "never"] = Field(
        "auto",
        description="activation ranges by step: auto, where one range would serve some steps badly; always; never",
    )
    intervals: int = Field(
        20, gt=0, description="groups of neighbouring steps with activation ranges of their own, by step"
    )
    range_trajectories: int = Field(
        12, gt=0, description="trajectories that ranges by step are set on, at every step"
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of the moving average of activation ranges over batches"
    )

    def by_steps(
        self, denoiser: Denoiser, plan: Plan, data: CalibSet, source: Source, split: bool = False
    ) -> Stepping:
        """Which activations get ranges by step, as `insert` is told."""
        if self.by_step == "always":
            return {"steps": StepTable.of(source.times(), self.intervals), "only": None}
        only = uneven(denoiser, plan, data, split=split) if self.by_step == "auto" else {}
        if not only:
            return ONE_RANGE
        source.progress.note(described(only))
        return {"steps": StepTable.of(source.times(), self.intervals), "only": only}

    def seen_by_step(self, network: Inserted, source: Source) -> CalibSet | None:
        """The records that ranges by step are set on."""
        if not any(quantizer.has_rows for quantizer in network.ranged()):
            return None
        return source.record(every(self.range_trajectories, range(source.steps)))

    def measure_inputs(
        self, network: Inserted, data: CalibSet, source: Source, search: SlicedSearch, batch: int = 64
    ) -> None:
        """Set the range of every activation, by step where it has them."""
        set_input_ranges(
            network,
            data,
            search,
            every_step=self.seen_by_step(network, source),
            batch=batch,
            momentum=self.momentum,
            progress=source.progress,
        )


class UnbiasedMethod(Method):
    """A method that rounds to nearest: what that does to the means of outputs can be taken back."""

    bias: bool = Field(False, description="afterwards shift biases so that no layer errs on average")

    def finish(self, network: Inserted, data: CalibSet | None, source: Source, batch: int = 64) -> Artifact:
        """The artifact; before it, where that was asked for, biases behind everything else that was fitted."""
        if self.bias:
            assert data is not None
            journal = Journal(
                source.cache, network, data, {"method": type(self).__name__} | self.model_dump()
            )
            correct = partial(correct_block, network, batch=batch)
            with Streams(network, data, source.cache, budget=source.memory) as streams:
                fit_blocks(
                    streams, correct, journal, stage="biases", activations=True, progress=source.progress
                )
        return freeze(network)


class PresetMethod(RangedMethod):
    """A method whose own numbers take a day: its fields' defaults are fast ones, and `paper` holds the published."""

    paper: ClassVar[dict[str, Any]] = {}
    paper_at: ClassVar[dict[int, dict[str, Any]]] = {}  # what it has for weights of so many bits
    preset: Literal["fast", "paper"] = Field(
        "fast", description="fast: minutes on two cores; paper: its own numbers"
    )

    @model_validator(mode="before")
    @classmethod
    def fill_preset(cls, fields: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """What is not given comes from the preset; the context may say how many bits weights have."""
        if fields.get("preset") != "paper":
            return fields
        return {**cls.paper, **cls.paper_at.get((info.context or {}).get("bits", 0), {}), **fields}


def split_here(wanted: bool, asked: bool, denoiser: Denoiser, source: Source) -> bool:
    """Whether layers over skip concatenations are split; a model without any is an error where that was asked for."""
    if not wanted or denoiser.concats():
        return wanted
    if asked:
        raise MethodError("this model has no skip concatenations to split", fix="leave --set split=true out")
    source.progress.note("no skip concatenations in this model: nothing to split")
    return False


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
