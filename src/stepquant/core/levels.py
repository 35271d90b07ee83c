"""The numbers that rows of a weight may take: integers times a scale, all of a grid's or those of a codebook."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.core.affine import dequantize, fake_quantize, fake_quantize_ste, quantize, scale_and_zero
from stepquant.core.codebook import (
    BYTES,
    ThroughCodebook,
    best_bytes,
    codebook_of,
    codes_of,
    nearest,
    tables_of,
)
from stepquant.core.codebook import enclosing as enclosing_in
from stepquant.core.grid import Grid
from stepquant.core.ranges import Search
from stepquant.core.rounding import enclosing


@dataclass(frozen=True, eq=False)
class Levels:
    """All integers of the grid. Scale and zero point are columns, with a number for each row."""

    grid: Grid
    scale: Tensor
    zero_point: Tensor
    codebook: Tensor  # a row of integers for each, in order; without a column where the grid has none

    @classmethod
    def fit(cls, rows: Tensor, grid: Grid, search: Search) -> Levels:
        """Those of the range that the search finds."""
        scale, zero_point = scale_and_zero(*search(rows, grid), grid)
        return cls(grid, scale.reshape(-1, 1), zero_point.reshape(-1, 1), scale.new_empty(0))

    def integers(self, rows: Tensor) -> Tensor:
        """The nearest ones."""
        return quantize(rows, self.scale, self.zero_point, self.grid)

    def values(self, rows: Tensor) -> Tensor:
        """What these integers stand for."""
        return dequantize(self.integers(rows), self.scale, self.zero_point).to(rows.dtype)

    def through(self, rows: Tensor) -> Tensor:
        """The same; gradients pass to the rows, and to the scale."""
        return fake_quantize_ste(rows, self.scale, self.zero_point, self.grid)

    def enclosing(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The integers below and above each number, and how much of the way up it is; both the same at an end."""
        return enclosing(rows, self.scale, self.zero_point, self.grid)

    def gaps_beside(self, integers: Tensor) -> tuple[Tensor, Tensor]:
        """From each of these integers to the next below and above; at an end as far as to the other side."""
        one = torch.ones_like(integers)
        return -one, one

    def ends(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest number of each row."""
        low, high = ((end - self.zero_point) * self.scale for end in (self.grid.qmin, self.grid.qmax))
        return low, high

    def gaps(self) -> Tensor:
        """How far the numbers of each row lie apart, on average."""
        return self.scale


class Chosen(Levels):
    """Those of a codebook, which need no search; there is no zero point."""

    @classmethod
    def fit(cls, rows: Tensor, grid: Grid, search: Search) -> Levels:
        scale, codebook = codebook_of(rows, grid.levels)
        return cls(grid, scale[:, None], torch.zeros_like(scale)[:, None], codebook)

    def integers(self, rows: Tensor) -> Tensor:
        return nearest(rows.float() * self.scale.reciprocal(), self.codebook)

    def through(self, rows: Tensor) -> Tensor:
        return ThroughCodebook.apply(rows, self.scale, self.codebook)  # type: ignore[no-any-return, no-untyped-call]

    def enclosing(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return enclosing_in(rows * self.scale.reciprocal(), self.codebook)

    def gaps_beside(self, integers: Tensor) -> tuple[Tensor, Tensor]:
        gaps, places = self.codebook.diff(dim=1).clamp(min=1), codes_of(integers, self.codebook)
        below, above = (gaps.gather(1, at.clamp(0, gaps.shape[1] - 1)) for at in (places - 1, places))
        return -below, above

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.codebook[:, :1] * self.scale, self.codebook[:, -1:] * self.scale

    def gaps(self) -> Tensor:
        widest = self.codebook[:, -1:] - self.codebook[:, :1]
        return self.scale * widest.clamp(min=1) / (self.grid.levels - 1)


class Moved(Levels):
    """Bytes of a range, moved to those of a codebook: the numbers that an activation may take."""

    @classmethod
    def fit(cls, rows: Tensor, grid: Grid, search: Search) -> Levels:
        return cls.over(rows, *search(rows, grid), grid)

    @classmethod
    def over(cls, rows: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Levels:
        """Those of this range, chosen for these rows."""
        scale, zero_point = (value.reshape(-1, 1) for value in scale_and_zero(low, high, grid))
        counts = [byte_counts(row) for row in quantize(rows, scale, zero_point, grid)]
        zeros = zero_point.flatten().int().tolist()
        codebook = torch.stack([best_bytes(one, grid.levels, zero) for one, zero in zip(counts, zeros)])
        return cls(grid, scale, zero_point, codebook.to(scale))

    def integers(self, rows: Tensor) -> Tensor:
        q = super().integers(rows)
        return tables_of(self.codebook).gather(1, q.long())

    def through(self, rows: Tensor) -> Tensor:
        tables = tables_of(self.codebook)
        moved = lambda q: tables.gather(1, q.long())  # noqa: E731
        return fake_quantize_ste(rows, self.scale, self.zero_point, self.grid, None, moved)


def byte_counts(q: Tensor) -> Tensor:
    """How often each byte occurs."""
    return torch.bincount(q.flatten().int(), minlength=BYTES)


def kind_of(grid: Grid) -> type[Levels]:
    if not grid.codebook:
        return Levels
    return Chosen if grid.signed else Moved


def rounded_over(x: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """A tensor on a grid of this one range, in its dtype; a codebook is the best for it."""
    if not grid.codebook:
        return fake_quantize(x, *scale_and_zero(low, high, grid), grid)
    row = x.reshape(1, -1)
    return Moved.over(row, low, high, grid).values(row).view_as(x)
