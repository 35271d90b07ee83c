"""Precision by step: which part of a trajectory keeps its activations in float.

The entries of a configuration are those that vllm-omni (#6560) and diffusers (#14664) read. They count iterations of the
sampler's loop, which no network sees: what it receives is t. So the values of t between which integers run stand beside
the counts, as they were met while the network was calibrated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from stepquant.core.entries import AGAIN, ANYTHING, Kind, entries, integer, list_of, one_of
from stepquant.errors import ArtifactError, StepquantError

RUNTIME = "runtime"  # the entry of a configuration that says what is not the same at every step
POLICY, TIMES = "diffusion_step_policy", "diffusion_step_t"
FLOAT, INTEGERS = "a16", "native"  # the words for activations in float, and as the weights were stored for
MODE, EXAMPLE = one_of(FLOAT, INTEGERS), "first=3,last=3"
NUMBER = Kind("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v))
NUMBER_OR_NULL = Kind(f"{NUMBER.words}, or null", lambda v: v is None or NUMBER.holds(v))


@dataclass(frozen=True)
class StepPolicy:
    """How many of the first and of the last steps have activations in float."""

    first: int = 0
    last: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """`first=3,last=3`, or one of the two."""
        found = re.findall(r"(first|last)=([0-9]{1,9})(?:,|$)", text)
        counts = {name: int(count) for name, count in found}
        written = ",".join(f"{name}={count}" for name, count in found)
        if written != text or len(counts) != len(found) or not any(counts.values()):
            raise StepquantError(
                "this does not say which steps keep their activations in float", got=text, expected=EXAMPLE
            )
        return cls(**counts)

    def __str__(self) -> str:
        counts = {"first": self.first, "last": self.last}
        return ",".join(f"{name}={count}" for name, count in counts.items() if count)

    def to_json(self, scope: str) -> dict[str, Any]:
        ends = {
            f"{name}_steps": {"count": count, "mode": FLOAT}
            for name, count in (("first", self.first), ("last", self.last))
        }
        said = {"schema_version": 1, "type": "first_last_n", "index_space": "denoising_loop_iteration"}
        return said | {"scope": [scope], "default_mode": INTEGERS} | ends | {"overlap": FLOAT}

    @classmethod
    def from_json(cls, data: Any, where: str = POLICY) -> tuple[Self, str]:
        """The policy, and the component that it is for. `reasoner` is about a part that no network here has."""
        one = Kind("[the name of one component]", lambda v: list_of(NAME, 1).holds(v) and len(v) == 1)
        end = Kind("an object", lambda v: isinstance(v, Mapping))
        needed = {
            "schema_version": Kind("1", lambda v: type(v) is int and v == 1),
            "type": one_of("first_last_n"),
            "index_space": one_of("denoising_loop_iteration"),
            "scope": one,
            "default_mode": one_of(INTEGERS),
            "first_steps": end,
            "last_steps": end,
            "overlap": MODE,  # of ends that meet, which a network that keeps them by t has none of
        }
        found = entries(data, where, needed, {"reasoner": MODE})
        counts = [count_of(found[name], f"{where}.{name}") for name in ("first_steps", "last_steps")]
        return cls(*counts), found["scope"][0]


def policy_of(config: Mapping[str, Any], where: str) -> tuple[StepPolicy, str] | None:
    """What the configuration of another program says of steps, and the part that it is for; None where it says nothing."""
    runtime = config.get(RUNTIME)
    if runtime is None:
        return None
    said = entries(runtime, f"{where}.{RUNTIME}", {}, {POLICY: ANYTHING}).get(POLICY)
    found = None if said is None else StepPolicy.from_json(said, f"{where}.{RUNTIME}.{POLICY}")
    return found if found is not None and (found[0].first or found[0].last) else None


NAME = Kind("the name of a component", lambda v: isinstance(v, str) and v.isidentifier())


def count_of(data: Any, where: str) -> int:
    """Of the steps at one end that are in float."""
    found = entries(data, where, {"count": integer(0), "mode": MODE})
    return found["count"] if found["mode"] == FLOAT else 0


@dataclass(frozen=True)
class FloatSteps:
    """A policy as a network can keep it: by the t that it receives.

    `start` and `end` are the t of the first and the last step, `first` and `last` those between a step in float and its
    neighbour in integers; None where no step at that end is in float. Some samplers begin with the largest t, some
    end with it.
    """

    policy: StepPolicy
    scope: str  # the component of the pipeline
    start: float
    first: float | None
    last: float | None
    end: float

    @classmethod
    def of(cls, policy: StepPolicy, scope: str, times: Tensor) -> Self:
        """`times`: what the network receives at every step, in the sampler's order."""
        t = times.double().flatten().tolist()
        if policy.first + policy.last >= len(t):
            raise StepquantError(
                "this policy leaves no step in integers",
                got=str(policy),
                expected=f"fewer than {len(t)} steps together",
                fix="name fewer of them, or calibrate over more --steps",
            )
        if t not in (sorted(t), sorted(t, reverse=True)) or t[0] == t[-1]:
            raise StepquantError(
                "this sampler goes back and forth in t, by which a network tells first steps from last ones",
                fix="leave the policy out, or take another --sampler",
            )
        inner = len(t) - policy.last
        first = (t[policy.first - 1] + t[policy.first]) / 2 if policy.first else None
        last = (t[inner - 1] + t[inner]) / 2 if policy.last else None
        return cls(policy, scope, t[0], first, last, t[-1])

    def __call__(self, t: Tensor, samples: int) -> Tensor:
        """Whether each sample is at a step in float; where it has many t, as one for each frame, by its noisiest."""
        sign = 1.0 if self.start > self.end else -1.0
        values = sign * t.detach().cpu().double()
        noise = values.reshape(samples, -1).amax(1) if t.numel() > 1 else values.reshape(1).expand(samples)
        found = torch.zeros(samples, dtype=torch.bool)
        if self.first is not None:
            found |= noise >= sign * self.first
        if self.last is not None:
            found |= noise <= sign * self.last
        return found

    @property
    def middle(self) -> float:
        """Some t at which integers run."""
        ends = (
            self.start if self.first is None else self.first,
            self.end if self.last is None else self.last,
        )
        return sum(ends) / 2

    def to_json(self) -> dict[str, Any]:
        t = {name: getattr(self, name) for name in ("start", "first", "last", "end")}
        return {POLICY: self.policy.to_json(self.scope), TIMES: t}

    @classmethod
    def from_json(cls, data: Any, where: str = "runtime") -> Self:
        any_value = Kind("an object", lambda v: isinstance(v, Mapping))
        found = entries(data, where, {POLICY: any_value, TIMES: any_value})
        policy, scope = StepPolicy.from_json(found[POLICY], f"{where}.{POLICY}")
        ends = {"first": NUMBER_OR_NULL, "last": NUMBER_OR_NULL}
        t = entries(found[TIMES], f"{where}.{TIMES}", {"start": NUMBER, **ends, "end": NUMBER})
        order = [t[name] for name in ("start", "first", "last", "end") if t[name] is not None]
        counted = [bool(policy.first), bool(policy.last)] == [t[name] is not None for name in ends]
        if not counted or order not in (sorted(order), sorted(order, reverse=True)) or len({*order}) < 2:
            raise ArtifactError(
                f"'{where}.{TIMES}' does not go with the policy",
                where=where,
                got=", ".join(f"{name} {value}" for name, value in t.items()),
                expected=f"t from the first to the last step, with bounds for {policy}",
                fix=AGAIN,
            )
        return cls(policy, scope, **t)
