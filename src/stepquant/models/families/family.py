"""Family: what a declaration says about one kind of diffusers model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

# How calls with and without the condition reach the model: halves of one batch, or one call after the other.
Guidance = Literal["none", "uncond, cond", "cond, uncond", "cond; uncond"]


def middle(blocks: Sequence[str]) -> str:
    return blocks[len(blocks) // 2]


def no_concats(_: nn.Module) -> dict[str, tuple[int, int]]:
    return {}


def children_of(*paths: str) -> Callable[[nn.Module], list[str]]:
    """The blocks in these lists of a model, one list after the other."""

    def blocks(model: nn.Module) -> list[str]:
        return [f"{path}.{i}" for path in paths for i, _ in enumerate(model.get_submodule(path).children())]

    return blocks


def taking_turns(*paths: str) -> Callable[[nn.Module], list[str]]:
    """The first blocks of these lists of a model, then the second ones, and so on."""

    def blocks(model: nn.Module) -> list[str]:
        count = len(list(model.get_submodule(paths[0]).children()))
        return [f"{path}.{i}" for i in range(count) for path in paths]

    return blocks


def joined(*patterns: str) -> Callable[[nn.Module], dict[str, tuple[int, int]]]:
    """Linears that read something of the width that they return, concatenated with something else."""

    def widths(model: nn.Module) -> dict[str, tuple[int, int]]:
        found = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear))
        return {
            path: (layer.out_features, layer.in_features - layer.out_features)
            for path, layer in found
            if any(matches(pattern, path) for pattern in patterns)
        }

    return widths


@dataclass(frozen=True)
class Family:
    """Arguments, roles and order of a model class; everything else follows from its building blocks."""

    models: tuple[str, ...]  # diffusers class names
    x: str  # argument with the noisy input
    top: Mapping[str, str]  # path pattern -> role, for leaves that no building block owns
    blocks: Callable[[nn.Module], Iterable[str]]  # paths in the order in which they run
    component: str = "transformer"  # what pipelines call it
    t: str = "timestep"
    text: tuple[str, ...] = ()  # arguments that only the prompt decides
    cond: tuple[str, ...] = ()  # arguments besides t that reach the modulation
    guidance: Guidance = "uncond, cond"
    shared: tuple[str, ...] = ()  # arguments without a batch axis
    deepest: Callable[[Sequence[str]], str] = (
        middle  # of the blocks, the one whose input says most about a sample
    )
    concats: Callable[[nn.Module], Mapping[str, tuple[int, int]]] = no_concats  # as `Denoiser.concats`
    prompt_blocks: tuple[str, ...] = ()  # lists of blocks that never see x
    read: tuple[str, ...] = ()  # patterns of layers whose weights are read while the layers are never called
    channels: int = 1  # axis of the prediction's channels
    generic: bool = False  # nobody declared the class: roles that no building block has follow from a call


def matches(pattern: str, path: str) -> bool:
    """`*` stands for one path element, a leading `**.` for any number of them."""
    if pattern.startswith("**."):
        parts = path.split(".")
        return any(matches(pattern[3:], ".".join(parts[i:])) for i in range(len(parts)))
    ours, theirs = pattern.split("."), path.split(".")
    return len(ours) == len(theirs) and all(fnmatchcase(b, a) for a, b in zip(ours, theirs))
