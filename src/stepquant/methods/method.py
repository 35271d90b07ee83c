"""Method: frozen hyper-parameters and a body in the order of the paper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import Plan


class Method(BaseModel, ABC):
    """Quantizes a denoiser with data from a source; the model is float again afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    presets: ClassVar[
        dict[str, dict[str, Any]]
    ] = {}  # named settings, chosen by the field `preset` where there is one

    @model_validator(mode="before")
    @classmethod
    def fill_preset(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the preset; the fields' own defaults are the first one."""
        return {**cls.presets.get(fields.get("preset", ""), {}), **fields}

    @abstractmethod
    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact: ...
