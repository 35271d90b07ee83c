"""Shape: how the arguments or results of a block are put together, and which of their rows belong to which record.

Most tensors have one row for each record. Frames of videos, tokens and pixels are folded into the batch, too: of such a
tensor a record has several rows, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from stepquant.errors import MethodError

PROBES = (
    2,
    3,
)  # batch sizes whose comparison shows which tensors have rows; the records of the first come first


@dataclass(frozen=True)
class Shape:
    """How a tree is put together: its leaves, and how many rows each record has in them; none in constants."""

    spec: TreeSpec
    leaves: tuple[Any, ...]
    rows: tuple[int, ...]

    def split(self, tree: Any) -> list[Tensor]:
        """The leaves that have rows, record by record."""
        leaves, _ = tree_flatten(tree)
        return [fold(leaf, rows) for leaf, rows in zip(leaves, self.rows, strict=True) if rows]

    def join(self, columns: Sequence[Tensor]) -> Any:
        """The tree with these leaves, and with the constants seen before."""
        pending = iter(columns)
        leaves = [unfold(next(pending), rows) if rows else leaf for leaf, rows in zip(self.leaves, self.rows)]
        return tree_unflatten(leaves, self.spec)

    @classmethod
    def of_list(cls, rows: Sequence[int]) -> Shape:
        """Of a list of tensors with so many rows for each record."""
        return cls(tree_flatten([0] * len(rows))[1], (None,) * len(rows), tuple(rows))


def fold(x: Tensor, rows: int) -> Tensor:
    """One entry for each record; with several rows, channels stand where losses look for them."""
    if rows == 1:
        return x
    apart = x.unflatten(0, (-1, rows))
    if x.ndim < 3:
        return apart
    return apart.movedim(-1, 1) if x.ndim == 3 else apart.transpose(1, 2)


def unfold(x: Tensor, rows: int) -> Tensor:
    """What `fold` was given."""
    if rows == 1:
        return x
    apart = x if x.ndim < 4 else x.movedim(1, -1) if x.ndim == 4 else x.transpose(1, 2)
    return apart.flatten(0, 1)


def shape_of(tree: Any, other: Any, where: str = "") -> Shape:
    """The shape of a tree, given the same for another batch, which begins with the same records."""
    (leaves, spec), (others, _) = tree_flatten(tree), tree_flatten(other)
    rows = tuple(rows_of(a, b, where) for a, b in zip(leaves, others, strict=True))
    constants = tuple(None if count else leaf for leaf, count in zip(leaves, rows))
    return Shape(spec, constants, rows)


def rows_of(one: Any, other: Any, where: str) -> int:
    """The rows that each record has in a leaf, given the leaf for both batches."""
    if not isinstance(one, Tensor):
        return 0
    few, many = PROBES
    count = one.shape[0] // few if one.ndim else 0
    if count and (one.shape[0], other.shape[0]) == (few * count, many * count):
        alike = same(one, other[: len(one)])
    else:
        count, alike = 0, one.shape == other.shape and same(one, other)
    if not alike:
        raise MethodError(
            f"what '{where}' sees cannot be told apart by record",
            got=f"tensors of {tuple(one.shape)} and {tuple(other.shape)} in batches of {few} and {many}",
            expected="the rows of each record one after the other",
            fix="choose a method that does not fit blocks",
        )
    return count


def same(one: Tensor, other: Tensor) -> bool:
    """Up to what another batch size changes in sums."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    size = float(one.float().nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(one.float(), other.float(), rtol=0, atol=0.02 * size + 1e-6, equal_nan=True)
