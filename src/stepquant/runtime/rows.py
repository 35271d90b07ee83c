"""Batches whose samples do not all take the same way through a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def by_group(
    arguments: Mapping[str, Any], groups: Tensor, run: Callable[[int, dict[str, Any], Tensor], Tensor]
) -> Tensor:
    """The predictions of a batch in its order; `run` makes those of each group of samples, whose places it is told."""
    out: Tensor | None = None
    for group in groups.unique().tolist():
        mine = (groups == group).nonzero().flatten()
        some = {name: pick(value, mine, len(groups)) for name, value in arguments.items()}
        part = run(group, some, mine)
        out = part.new_empty((len(groups), *part.shape[1:])) if out is None else out
        out[mine] = part
    assert out is not None
    return out


def pick(value: Any, rows: Tensor, samples: int) -> Any:
    """The rows of an argument that has a batch axis; nested ones too."""
    if isinstance(value, dict):
        return {name: pick(inner, rows, samples) for name, inner in value.items()}
    has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == samples
    return value[rows.to(value.device)] if has_rows else value
