"""Method: frozen hyper-parameters and a body in the order of the paper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import Plan


class Method(BaseModel, ABC):
    """Quantizes a denoiser with data from a source; the model is float again afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact: ...


class PresetMethod(Method):
    """A method whose own numbers take a day: its fields' defaults are fast ones, and `paper` holds the published."""

    paper: ClassVar[dict[str, Any]] = {}
    preset: Literal["fast", "paper"] = Field(
        "fast", description="fast: minutes on two cores; paper: its own numbers"
    )

    @model_validator(mode="before")
    @classmethod
    def fill_preset(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the preset."""
        return {**cls.paper, **fields} if fields.get("preset") == "paper" else fields
