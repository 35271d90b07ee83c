"""The tensors of a float network in other names, each with the rows of which it is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from stepquant.hub.exports.at_rest import Network
from stepquant.models.originals import in_original_names

COLUMNS = 2  # of what stands for a weight: enough to see that they stay side by side and in order
ORIGINAL, DIFFUSERS = "original", "diffusers"


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one tensor of the network."""

    name: str
    first: int
    rows: int


@dataclass(frozen=True)
class Naming:
    """Name in the file -> the pieces that lie below each other in it, and their shape together."""

    pieces: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    original: bool  # whether these are names of the original repository


def naming_of(network: Network, names: str) -> Naming:
    """In the names of the original repository where they are asked for and known; else in those of diffusers."""
    shapes = network.shapes
    ends = torch.tensor([rows_of(shape) for shape in shapes.values()]).cumsum(0)
    given = {name: numbered(shape, int(end)) for (name, shape), end in zip(shapes.items(), ends)}
    made = in_original_names(network.kind, given, network.model.config) if names == ORIGINAL else None
    inside = list(shapes)
    pieces = {}
    for name, value in (given if made is None else made).items():
        rows = value.reshape(len(value), -1)[:, 0] // COLUMNS if value.ndim else value.reshape(1) // COLUMNS
        pieces[name] = pieces_of(rows, ends, inside)
    total = {
        name: joined_shape([shapes[one.name] for one in found], sum(one.rows for one in found))
        for name, found in pieces.items()
    }
    return Naming(pieces, total, made is not None)


def rows_of(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def numbered(shape: tuple[int, ...], end: int) -> Tensor:
    """The numbers of the tensor's rows, in as few columns as show what becomes of them."""
    rows = COLUMNS * torch.arange(end - rows_of(shape), end)
    if len(shape) < 2:
        return rows.reshape(shape)
    wide = rows[:, None] + torch.arange(min(COLUMNS, prod(shape[1:])))
    return wide.reshape(*wide.shape, *[1] * (len(shape) - 2))


def pieces_of(rows: Tensor, ends: Tensor, names: list[str]) -> tuple[Piece, ...]:
    owners = torch.searchsorted(ends, rows, right=True)
    cuts = ((rows.diff() != 1) | (owners.diff() != 0)).nonzero().flatten() + 1
    begins = [0, *cuts.tolist()]
    sizes = torch.tensor([*begins, len(rows)]).diff().tolist()
    found = []
    for begin, size in zip(begins, sizes):
        owner = int(owners[begin])
        before = int(ends[owner - 1]) if owner else 0
        found.append(Piece(names[owner], int(rows[begin]) - before, size))
    return tuple(found)


def joined_shape(shapes: list[tuple[int, ...]], rows: int) -> tuple[int, ...]:
    return (rows, *shapes[0][1:]) if shapes[0] else ()


def layers_in(network: Network, name: str, pieces: tuple[Piece, ...]) -> list[str]:
    """The quantized layers of whose weights a tensor of the file is made; none for biases and floats."""
    if not name.endswith(".weight"):
        return []
    return [path for piece in pieces if (path := piece.name.removesuffix(".weight")) in network.layers]


def put_together(pieces: tuple[Piece, ...], value: Callable[[str], Tensor]) -> Callable[[], Tensor]:
    """The rows of several tensors below each other, when they are asked for."""

    def made() -> Tensor:
        parts = [value(one.name) for one in pieces]
        if len(parts) == 1 and pieces[0].first == 0:
            return parts[0]
        return torch.cat([part[one.first : one.first + one.rows] for part, one in zip(parts, pieces)])

    return made
