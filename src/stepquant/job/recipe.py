"""Recipe: everything that decides the bytes of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationError,
)

from stepquant import methods
from stepquant.core.policy import StepPolicy
from stepquant.errors import StepquantError, UnknownNameError
from stepquant.methods.method import Method
from stepquant.models.call import PACKED, Asked, Call, steps_of
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import SAMPLERS
from stepquant.quant.auto import Budget
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import scheme
from stepquant.version import __version__

DEFAULT_SCHEME = "w8a8"
STEPS = 100
IN_FULL = {"calls": "in full"}  # context of JSON for another process, which has no files of calls


def read_call(data: dict[str, Any]) -> Call:
    return Call.unpacked(data) if PACKED in data else Call.from_json(data)


WrittenCall = Annotated[
    InstanceOf[Call],
    BeforeValidator(lambda one: read_call(one) if isinstance(one, dict) else one),
    PlainSerializer(lambda one, info: one.packed() if info.context == IN_FULL else dict(one.described)),
]


class Recipe(BaseModel):
    """Everything that decides the bytes of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "stepquant:characters"
    method: str = "ptq4dm"
    scheme: str | None = None  # None: the plan alone, or w8a8 without one
    plan: dict[str, Any] | None = None  # rules that come before those of the scheme
    settings: dict[str, Any] = Field(default_factory=dict)  # fields of the method
    steps: int = Field(STEPS, gt=0)
    sampler: str | None = None  # None: the pipeline's own
    seed: int = Field(0, ge=0, lt=2**63)
    prompts: tuple[str, ...] | None = None
    calls: tuple[WrittenCall, ...] = ()  # arguments of the pipeline, instead of prompts
    device: str = "cpu"
    components: tuple[str, ...] = ()  # of the pipeline, by their folders; nothing: the denoiser alone
    policy: str | None = None  # which steps keep their activations in float, as first=3,last=3

    @classmethod
    def of(cls, **fields: Any) -> Recipe:
        """The recipe with these fields; what does not fit is one error that names the field."""
        for name in fields:
            if name not in cls.model_fields:
                raise UnknownNameError("key of the recipe", name, cls.model_fields)
        asked = steps_of(fields.get("calls") or (), fields.get("steps"))
        fields["steps"] = STEPS if asked is None else asked
        if fields.get("calls") and fields.get("prompts"):
            raise StepquantError("calls hold their prompts themselves", fix="give prompts or calls")
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise StepquantError(f"'{field}' of the recipe: {first['msg']}", got=first["input"]) from error

    @property
    def asked(self) -> tuple[Asked, ...]:
        """What the pipeline is asked for, in turn."""
        return self.calls or self.prompts or ()

    @property
    def budget(self) -> Budget | None:
        """What an automatic scheme may cost; its plan follows from the model."""
        return Budget.of(self.scheme)

    def build_method(self) -> Method:
        return methods.build(self.method, self.settings, self.build_plan().weight_bits)

    def build_plan(self) -> Plan:
        """The plan's rules first, then those of the scheme; of an automatic one what it starts from."""
        if self.budget is not None:
            return self.budget.base()
        if self.plan is None:
            return scheme(DEFAULT_SCHEME if self.scheme is None else self.scheme)
        own = Plan.from_json(self.plan)
        return (
            own
            if self.scheme is None
            else scheme(self.scheme).with_rules(own.rules, f"{own.name}+{self.scheme}")
        )

    def check(self) -> None:
        """Find what cannot work before anything slow begins."""
        self.build_method()
        self.build_plan()
        if self.budget is not None and self.plan is not None:
            raise StepquantError(
                f"'{self.scheme}' makes its plan itself", fix="leave the plan out, or name another scheme"
            )
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise UnknownNameError("sampler", self.sampler, SAMPLERS)
        if self.step_policy is not None:
            self.check_policy(self.step_policy)

    @property
    def step_policy(self) -> StepPolicy | None:
        """What `policy` says."""
        return None if self.policy is None else StepPolicy.parse(self.policy)

    def check_policy(self, policy: StepPolicy) -> None:
        """It must be about something, and its float steps must not be corrected for an error that they do not have."""
        if not self.build_plan().quantizes_activations():
            raise StepquantError(
                "activations are in float at every step: a policy would change nothing",
                got=f"{policy} with {self.scheme or self.build_plan().name}",
                fix="leave the policy out, or choose a scheme with activations in integers, as w8a8",
            )
        instead = self.build_method().uncorrected
        if instead is not None:
            raise StepquantError(
                "a correction is fitted on integers at every step, and would spoil the steps in float",
                got=f"{policy} with {self.method}",
                fix=f"leave the policy out, or ask for {instead}",
            )

    def provenance(self, pipeline: Any) -> dict[str, Any]:
        """What the artifact says about how it came about; the same for everybody who repeats it.

        The digest in it reads the entire float model: ask once.
        """
        return self.provenance_of(type(pipeline.scheduler).__name__, Denoiser.of(pipeline).digest())

    def provenance_of(self, sampler: str, digest: str) -> dict[str, Any]:
        """The same of a model with this digest, in a pipeline with this sampler of its own."""
        components = {"components": list(self.components)} if self.components else {}
        policy = {} if self.step_policy is None else {"policy": str(self.step_policy)}
        return (
            components
            | {
                "model": Path(self.model).resolve().name if Path(self.model).is_dir() else self.model,
                "model_digest": digest,
                "method": self.method,
                "settings": self.build_method().model_dump(mode="json"),
                "scheme": self.build_plan().name,
                "plan": self.build_plan().to_json()["rules"],
                "steps": self.steps,
                "sampler": self.sampler or sampler,
                "seed": self.seed,
                "prompts": list(self.prompts) if self.prompts else None,
                "calls": [dict(one.described) for one in self.calls] or None,
                "versions": {
                    "stepquant": __version__,
                    "torch": torch.__version__,
                    "diffusers": diffusers.__version__,
                },
            }
            | policy
        )
