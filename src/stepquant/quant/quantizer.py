"""Quantizer: the module that holds a grid, its scales and zero points at one site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from stepquant.core.affine import dequantize, fake_quantize, fake_quantize_log, quantize, scales_of_rows
from stepquant.core.codebook import BYTES, best_bytes, evenly, tables_of
from stepquant.core.grid import AS_THEY_COME, Grid
from stepquant.core.levels import Levels, kind_of
from stepquant.core.policy import FloatSteps
from stepquant.core.ranges import Search
from stepquant.core.slices import Slices
from stepquant.core.steps import StepTable
from stepquant.errors import CalibrationError, RangeError

Port = Literal["weight", "input", "query", "key", "value", "probabilities"]
Observer = Callable[["Quantizer", Slices], None]
ALL = slice(None)


class StandIn(Protocol):
    """Quantizes in place of a quantizer, while its step is learnt."""

    def __call__(
        self, quantizer: Quantizer, x: Tensor, part: slice = ALL, total: int | None = None
    ) -> Tensor: ...

    def again(self) -> AbstractContextManager[None]:
        """In there the next call is the one that would come next now, chance included."""
        ...


@dataclass(frozen=True)
class Site:
    """Where a quantizer sits: a layer, what it is for, and which of its tensors is meant."""

    path: str
    role: str
    port: Port

    def __str__(self) -> str:
        return f"{self.path}:{self.port}"


class Clock:
    """Which row of every per-step range the samples of the present call read, and which of them have activations in float."""

    def __init__(self, table: StepTable | None, float_steps: FloatSteps | None = None) -> None:
        self.table, self.float_steps = table, float_steps
        self.rows: Tensor | None = None
        self.floats: Tensor | None = None
        self.times: Tensor | None = None  # the t of every record, for blocks that are called alone

    def read(self, t: Tensor, samples: int) -> None:
        """Look up the t of a call, one for all samples or one for each."""
        if self.float_steps is not None:
            self.floats = self.float_steps(t, samples)
        if self.table is None:
            return
        rows = self.table.rows_of(t)
        if (rows < 0).any():
            unknown = t.reshape(-1)[rows.argmin()].item()
            raise CalibrationError(
                "a call has a t that no range was made for",
                got=f"{unknown:g}",
                expected=f"one of the {len(self.table.times)} values of the sampler that ranges are made for",
                fix="record with the same sampler and number of steps",
            )
        self.rows = rows.expand(samples) if len(rows) == 1 else rows

    def at(self, records: Tensor | slice) -> None:
        """Look up the t of these records, which the next call is made of."""
        assert self.times is not None, "records are known before blocks are called alone"
        times = self.times[records]
        self.read(times, len(times))

    def spread(self, values: Tensor, x: Tensor, part: slice = ALL, total: int | None = None) -> Tensor:
        """Per-step values, one row for each of `x`, which is this part of `total` rows.

        Frames or tokens that are folded into the batch are several rows for each sample of the call.
        """
        total = len(x) if total is None else total
        if self.rows is None or not len(self.rows) or total % len(self.rows):
            raise RangeError("a per-step range is used outside a call of the whole model")
        return over(values.to(x.device)[self.rows.to(x.device)], x, part, total)

    def spared(self, x: Tensor, rounded: Tensor, part: slice = ALL, total: int | None = None) -> Tensor:
        """`rounded`, but `x` in the samples whose step has activations in float; what samples share is rounded for all."""
        total = len(x) if total is None else total
        if self.floats is None or total % len(self.floats) or not self.floats.any():
            return rounded
        return torch.where(over(self.floats.to(x.device), x, part, total), x, rounded)


def over(samples: Tensor, x: Tensor, part: slice, total: int) -> Tensor:
    """A value of every sample, over the rows of `x`."""
    rows = samples.repeat_interleave(total // len(samples))[part]
    return rows.reshape(-1, *[1] * (x.ndim - 1))


class Quantizer(nn.Module):
    """Identity until enabled; then the fake quantization of its grid. Ranges are set, never guessed.

    On a grid by the token there is none to set: what lies in the dimensions from `first` on has a scale of its own. Nor on
    one of powers of two.
    """

    scale: Tensor
    zero_point: Tensor
    codebook: Tensor

    def __init__(self, grid: Grid, site: Site, clock: Clock | None = None, first: int = -1) -> None:
        super().__init__()
        self.grid, self.site, self.clock, self.first = grid, site, clock, first
        self.enabled = False
        self.observer: Observer | None = None
        self.stand_in: StandIn | None = None
        self.bits: tuple[int, ...] = ()  # of every row of a per-step range, where they differ
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0))
        self.register_buffer("codebook", torch.empty(0))  # the integers that each row may take, in order
        # What every byte of an input is moved to.
        self.register_buffer("tables", torch.empty(0), persistent=False)

    @property
    def dynamic(self) -> bool:
        """Whether its scales are found as numbers come, so that there is no range to set."""
        return self.grid.granularity in AS_THEY_COME

    @property
    def has_rows(self) -> bool:
        """Whether it has a range for every row of the clock's table."""
        return self.grid.granularity == "step"

    @property
    def is_set(self) -> bool:
        return self.scale.numel() > 0 and not bool(self.scale.isnan().any())

    def set_range(self, scale: Tensor, zero_point: Tensor, row: int | None = None) -> None:
        """Scales and zero points, one per row that the grid shares them over; or of one row of a per-step range."""
        if not (torch.isfinite(scale).all() and torch.isfinite(zero_point).all() and (scale > 0).all()):
            raise RangeError(
                f"the range of '{self.site}' is not finite and positive",
                got=f"scale {scale.min().item():g} to {scale.max().item():g}",
                fix="look for NaN or infinite activations in the float model at this layer",
            )
        former = self.zero_point.clone()
        if row is None:
            self.scale = scale.detach().float().reshape(-1).clone()
            self.zero_point = zero_point.detach().float().reshape(-1).clone()
        else:
            if not self.scale.numel():
                shape = (2, self.table.groups)
                self.scale, self.zero_point = torch.full(shape, torch.nan, device=scale.device)
            self.scale[row], self.zero_point[row] = scale.item(), zero_point.item()
        if self.site.port == "input" and not torch.equal(former, self.zero_point):
            self.set_codebook(None, row)

    def set_codebook(self, counts: Tensor | None, row: int | None = None) -> None:
        """The integers that an input may take, where it has a codebook: the best for bytes that occur so often; at equal
        distances where that is not known."""
        if not self.grid.codebook:
            return
        shape = (len(self.zero_point), self.grid.levels)
        if self.codebook.shape != shape:
            self.codebook = self.scale.new_zeros(shape)
        for place in range(shape[0]) if row is None else (row,):
            levels, zero = self.grid_at(place).levels, int(self.zero_point[place])
            found = evenly(levels, zero) if counts is None else best_bytes(counts, levels, zero)
            more = found[-1:].expand(shape[1] - levels)  # where other steps have more bits
            self.codebook[place] = torch.cat([found, more]).to(self.codebook)
        self.tables = tables_of(self.codebook)

    def moved(self, q: Tensor, part: slice = ALL, total: int | None = None) -> Tensor:
        """The integers of an input's codebook to which bytes are moved."""
        place = q
        if self.has_rows:
            first = torch.arange(len(self.tables), device=q.device) * BYTES
            place = self.spread(first, q, part, total) + q
        return self.tables.flatten().index_select(0, place.flatten().int()).view_as(q)

    def fit(self, rows: Tensor, search: Search) -> None:
        """The numbers that these rows of a weight may take."""
        found = kind_of(self.grid).fit(rows, self.grid, search)
        self.codebook = found.codebook
        self.set_range(found.scale, found.zero_point)

    @property
    def levels(self) -> Levels:
        """The numbers that rows of a weight may take."""
        scale, zero_point = (value[:, None] for value in self.range())
        return kind_of(self.grid)(self.grid, scale, zero_point, self.codebook)

    def set_bits(self, bits: Sequence[int]) -> None:
        """Of every row of a per-step range; the grid becomes that of the widest."""
        assert len(bits) == self.table.groups, "as many as rows"
        self.grid = replace(self.grid, bits=max(bits))
        self.bits = tuple(bits) if len(set(bits)) > 1 else ()

    @property
    def table(self) -> StepTable:
        """The steps that a range by step has rows for."""
        assert self.clock is not None
        assert self.clock.table is not None, "only per-step ranges have rows"
        return self.clock.table

    def spread(self, values: Tensor, x: Tensor, part: slice = ALL, total: int | None = None) -> Tensor:
        """Values of every row of a per-step range, one for each sample of `x`."""
        assert self.clock is not None, "only per-step ranges have rows"
        return self.clock.spread(values, x, part, total)

    def grid_at(self, row: int | None) -> Grid:
        """The grid of one row."""
        return self.grid if row is None or not self.bits else replace(self.grid, bits=self.bits[row])

    def range(self) -> tuple[Tensor, Tensor]:
        if not self.scale.numel():
            raise RangeError(
                f"quantizer '{self.site}' is used before its range is set",
                fix="set ranges from calibration data first (fit.ranges)",
            )
        return self.scale, self.zero_point

    def present(self) -> tuple[Tensor, Tensor]:
        """The range that the samples of the present call read, all of them the same."""
        scale, zero_point = self.range()
        if not self.has_rows:
            return scale, zero_point
        rows = None if self.clock is None else self.clock.rows
        assert rows is not None, "a call is under way"
        return scale[rows[:1]], zero_point[rows[:1]]

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self, Slices.of(x))
        return self.rounded(x)

    def rounded(self, x: Tensor, part: slice = ALL, total: int | None = None) -> Tensor:
        """What becomes of `x`, which is this part of `total` rows; nobody observes it."""
        if not self.enabled:
            return x
        return self.spared(x, self.on_grid(x, part, total), part, total)

    def spared(self, x: Tensor, rounded: Tensor, part: slice = ALL, total: int | None = None) -> Tensor:
        """`rounded`, but `x` at steps in float."""
        return rounded if self.clock is None else self.clock.spared(x, rounded, part, total)

    def on_grid(self, x: Tensor, part: slice, total: int | None) -> Tensor:
        if self.stand_in is not None:
            return self.stand_in(self, x, part, total)
        if self.grid.granularity == "log":
            return fake_quantize_log(x, self.grid)
        if self.dynamic:
            scale = scales_of_rows(x, self.first, self.grid.qmax)
            return fake_quantize(x, scale, torch.zeros_like(scale), self.grid)
        scale, zero_point = self.range()
        if self.has_rows:
            scale, zero_point = (self.spread(values, x, part, total) for values in (scale, zero_point))
        if self.grid.codebook:
            q = self.moved(quantize(x, scale, zero_point, self.grid), part, total)
            return dequantize(q, scale, zero_point).to(x.dtype)
        if self.bits:
            grids = [self.grid_at(row) for row in range(len(self.bits))]
            ends = (torch.tensor([one.qmin for one in grids]), torch.tensor([one.qmax for one in grids]))
            low, high = (self.spread(end.to(scale), x, part, total) for end in ends)
            q = quantize(x, scale, zero_point, self.grid).clamp(low, high)
            return q.sub_(zero_point).mul_(scale).to(x.dtype)
        return fake_quantize(x, scale, zero_point, self.grid)

    def extra_repr(self) -> str:
        return f"{self.site} {self.grid}"
