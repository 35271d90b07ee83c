"""Family: what a declaration says about one kind of diffusers model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Guidance = Literal["none", "uncond, cond", "cond, uncond", "two calls"]


@dataclass(frozen=True)
class Family:
    """Arguments, roles and order of a model class; everything else follows from its building blocks."""

    models: tuple[str, ...]  # diffusers class names
    x: str  # argument with the noisy input
    top: Mapping[str, str]  # path pattern -> role, for leaves that no building block owns
    walk: Literal["unet"] | tuple[str, ...]  # reconstruction units in execution order
    t: str = "timestep"
    text: tuple[str, ...] = ()  # arguments that only the prompt decides
    cond: tuple[str, ...] = ()  # arguments besides t that reach the modulation
    guidance: Guidance = "uncond, cond"
    shared: tuple[str, ...] = ()  # arguments without a batch axis
    concat: Literal["", "unet"] = ""  # who owns concatenated inputs


def matches(pattern: str, path: str) -> bool:
    """`*` stands for one path element, a leading `**.` for any number of them."""
    if pattern.startswith("**."):
        parts = path.split(".")
        return any(matches(pattern[3:], ".".join(parts[i:])) for i in range(len(parts)))
    ours, theirs = pattern.split("."), path.split(".")
    return len(ours) == len(theirs) and all(fnmatchcase(b, a) for a, b in zip(ours, theirs))
