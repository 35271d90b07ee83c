"""The integers of a foreign layer, and the plainest grid of ours on which they stand for the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepquant.core.grid import Grid
from stepquant.core.pack import pack


@dataclass(frozen=True)
class Rows:
    """code * scale + offset, with as many scales in a row as there are groups in it. Scales may be of any sign, or zero."""

    bits: int
    signed: bool
    codes: Tensor  # (outputs, inputs)
    scales: Tensor  # (outputs, groups)
    offsets: Tensor | None = None  # as scales

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    def take(self, rows: Tensor) -> Rows:
        offsets = None if self.offsets is None else self.offsets[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], offsets=offsets)

    def reshape(self, outputs: int) -> Rows:
        """The same numbers in so many rows."""
        codes, scales = self.codes.reshape(outputs, -1), self.scales.reshape(outputs, -1)
        offsets = None if self.offsets is None else self.offsets.reshape(outputs, -1)
        return replace(self, codes=codes, scales=scales, offsets=offsets)

    def floats(self) -> Tensor:
        """In the order of additions that the formats define."""
        groups = self.codes.reshape(*self.scales.shape, -1).float() * self.scales[..., None]
        groups = groups if self.offsets is None else groups + self.offsets[..., None]
        return groups.reshape(self.codes.shape)


def below_each_other(parts: list[Rows]) -> Rows:
    """Of layers that are alike."""
    first, offsets = parts[0], [part.offsets for part in parts if part.offsets is not None]
    if len(parts) == 1:
        return first
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        offsets=torch.cat(offsets) if offsets else None,
    )


def stored(rows: Rows) -> tuple[Grid, dict[str, Tensor]]:
    """The grid, and the tensors of a layer of the artifact but for its bias.

    Scales become positive: code' = lowest + highest - code turns the numbers of a group around, as does its zero point.
    """
    groups = rows.codes.reshape(*rows.scales.shape, -1).to(torch.int16)
    ends = 2 * rows.lowest + 2**rows.bits - 1  # lowest + highest
    turned, nothing = rows.scales < 0, rows.scales == 0
    groups = torch.where(turned[..., None], ends - groups, groups).masked_fill_(nothing[..., None], 0)
    scales = rows.scales.abs()
    largest = scales.amax(
        1, keepdim=True
    )  # of codes that are all 0 any scale will do: that of its row, if there is one
    given = {
        "weight_scale": torch.where(nothing, largest.masked_fill(largest == 0, 1.0), scales),
        "weight_zero_point": torch.where(turned, ends, 0).to(torch.int16),
        "weight_offset": rows.offsets,
    }
    if not turned.any() and (not rows.signed or bool(groups.min() > rows.lowest)):
        given["weight_zero_point"] = None
    if rows.offsets is not None and not rows.offsets.any():
        given["weight_offset"] = None
    present = {name: value for name, value in given.items() if value is not None}
    symmetric = "weight_zero_point" not in present
    if all(bool((value == value[:1, :1]).all()) for value in present.values()):
        grid = Grid(rows.bits, rows.signed, symmetric, "tensor")
        present = {name: value[:1, 0] for name, value in present.items()}
    elif all(bool((value == value[:, :1]).all()) for value in present.values()):
        grid = Grid(rows.bits, rows.signed, symmetric, "channel")
        present = {name: value[:, 0] for name, value in present.items()}
    else:
        grid = Grid(rows.bits, rows.signed, symmetric, "group", groups.shape[-1])
    return grid, {"weight": pack(groups, grid)} | {n: v.reshape(-1).clone() for n, v in present.items()}
