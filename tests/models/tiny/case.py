"""Case: a tiny model, what it is called with, and one other value for each of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]
generator = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def twice(*row: float) -> Tensor:
    """The same row for both samples of a batch."""
    return torch.tensor([row[0] if len(row) == 1 else row] * 2)


def angles(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which neighbouring channels are turned, as pairs."""
    turns = torch.rand(tokens, width // 2).repeat_interleave(2, -1)
    return turns.cos(), turns.sin()


def case(model: nn.Module, given: dict[str, Any], **changing: str) -> Case:
    """`changing` names arguments by labels; `added_cond_kwargs.time_ids` is one entry of a nested argument."""
    return model.eval(), given, {label: changed(given, path) for label, path in changing.items()}


def changed(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    name, _, rest = path.partition(".")
    return {name: {**given[name], **changed(given[name], rest)} if rest else other(given[name])}


def other(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(other(part) for part in value)
    return value + (torch.randn(value.shape, generator=generator) if value.is_floating_point() else 2)


def without_zeros(model: nn.Module) -> nn.Module:
    """Layers that start at zero hide what they read from whoever looks at outputs."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model
