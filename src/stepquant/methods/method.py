"""Method: frozen hyper-parameters and a body in the order of the paper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import partial
from typing import Any, ClassVar, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from stepquant.artifact import Artifact
from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.ranges import SlicedSearch
from stepquant.core.steps import StepTable
from stepquant.errors import MethodError
from stepquant.fit.blocks import fit_blocks
from stepquant.fit.correct_bias import correct_block
from stepquant.fit.journal import Journal
from stepquant.fit.ranges import set_input_ranges
from stepquant.fit.streams import Streams
from stepquant.fit.uneven import described, uneven
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import Inserted, Place
from stepquant.quant.plan import Plan


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
    def uncorrected(self) -> str | None:
        """What to ask for instead where predictions are corrected at every step; None where they are not."""
        return None

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
    gain: bool = Field(
        False, description="afterwards scale channels so that none shrinks, and shift biases behind them"
    )

    @property
    def corrected(self) -> bool:
        return self.bias or self.gain

    def finish(self, network: Inserted, data: CalibSet | None, source: Source, batch: int = 64) -> Artifact:
        """The artifact; before it, where that was asked for, channels behind everything else that was fitted."""
        if self.corrected:
            assert data is not None
            settings = {"method": type(self).__name__} | self.model_dump()
            journal = Journal(source.cache, network, data, settings)
            with Streams(network, data, source.cache, budget=source.memory) as streams:
                self.correct(streams, journal, source, batch)
        return freeze(network)

    def correct(self, streams: Streams, journal: Journal, source: Source, batch: int) -> None:
        fit = partial(correct_block, streams.network, batch=batch, gain=self.gain)
        fit_blocks(streams, fit, journal, stage="biases", activations=True, progress=source.progress)


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
