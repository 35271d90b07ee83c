"""Correction: what makes the predictions of a quantized denoiser come nearer to the float one's.

It is fitted on the integers that will run, so it alone of all that methods share stands on the runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.methods.method import Method
from stepquant.models.denoiser import Denoiser, twin
from stepquant.quant.plan import Plan
from stepquant.runtime.lower import lower


class Correction(BaseModel, ABC):
    """Corrects the predictions of a quantized denoiser at every step, so that they come near to the float one's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    calibrates: ClassVar[bool] = True  # False: no record changes what it makes

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, quantized: Denoiser, source: Source
    ) -> tuple[StepCorrection, StepTable]: ...


class Corrected(Method):
    """A method, and behind it a correction that is fitted on the very integers that will run."""

    method: SerializeAsAny[Method]
    correction: SerializeAsAny[Correction]

    @property
    def uncorrected(self) -> str | None:
        return "the method in front of '+' alone"

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        artifact = self.method(denoiser.giving_up(False), plan, source)
        quantized = Denoiser(lower(twin(denoiser.model), artifact))
        return artifact.with_correction(*self.correction(denoiser, quantized, source))
