"""Ranges: the interval that a grid is stretched over, one per row of values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepquant.core.affine import fake_quantize, scale_and_zero
from stepquant.core.grid import Grid, GridError
from stepquant.core.slices import Slices

Rows = Tensor | Slices  # of slices there is a single row
Search = Callable[[Tensor, Grid], tuple[Tensor, Tensor]]  # rows (n, elements), grid -> low (n,), high (n,)
CACHED = 1 << 17  # elements of rows whose error is taken at once: nothing of it leaves the cache of a core
SlicedSearch = Callable[[Slices, Grid], tuple[Tensor, Tensor]]


def minmax(rows: Rows, grid: Grid) -> tuple[Tensor, Tensor]:
    """The whole range of every row."""
    if isinstance(rows, Slices):
        return rows.ends
    low, high = rows.float().aminmax(dim=1)
    return low, high


def percentile(rows: Rows, grid: Grid, *, percent: float = 99.99) -> tuple[Tensor, Tensor]:
    """The range without the outermost (100 - percent) percent of the values on each side (linear interpolation)."""
    if not 50 < percent <= 100:
        raise GridError(f"a percentile range lies between 50 and 100, not at {percent}")
    last = (rows.count if isinstance(rows, Slices) else rows.shape[1]) - 1
    places = last - percent / 100 * last, percent / 100 * last
    ranks = [min(int(place) + more, last) for place in places for more in (0, 1)]
    if isinstance(rows, Slices):
        found = rows.ranked(ranks)[None]
    else:
        found = rows.float().sort(dim=1).values[:, ranks]
    low, high = (torch.lerp(found[:, i], found[:, i + 1], place % 1) for i, place in zip((0, 2), places))
    return low, high


def lp_search(
    rows: Tensor, grid: Grid, *, p: float = 2.4, candidates: int = 100, outermost: int = 32
) -> tuple[Tensor, Tensor]:
    """Of the ranges i/candidates * [min, max], the one whose quantization error has the least p-norm.

    A candidate is ruled out by its `outermost` values alone, whose error is a part of the whole.
    """
    low, high = minmax(rows, grid)
    extremes = rows.gather(1, rows.abs().topk(min(outermost, rows.shape[1]), dim=1).indices)
    best = torch.full_like(low, torch.inf)
    chosen = torch.ones_like(low)
    few = max(CACHED // rows.shape[1], 1)
    for index in range(candidates, 0, -1):
        fraction = index / candidates
        hopeful = (lp_error(extremes, low * fraction, high * fraction, grid, p) < best).nonzero().flatten()
        for some in hopeful.split(few):
            error = lp_error(rows[some], low[some] * fraction, high[some] * fraction, grid, p)
            better = error < best[some]
            best[some[better]], chosen[some[better]] = error[better], fraction
    return low * chosen, high * chosen


def lp_error(
    rows: Tensor, low: Tensor, high: Tensor, grid: Grid, p: float, mass: Tensor | None = None
) -> Tensor:
    """Sum of |x - Q(x)|^p per row, each value counted `mass` times."""
    scale, zero_point = scale_and_zero(low, high, grid)
    error = fake_quantize(rows, scale[:, None], zero_point[:, None], grid).sub_(rows).abs_().pow_(p)
    return (error if mass is None else error * mass).sum(1)


def lp_search_binned(
    rows: Rows, grid: Grid, *, p: float = 2.4, candidates: int = 100, bins: int = 8192
) -> tuple[Tensor, Tensor]:
    """`lp_search` over the histogram of a single row: for activations, where exact search would take minutes.

    A bin is at least 32 times finer than a step of the widest grid, so that the centres stand in for the values.
    """
    if isinstance(rows, Tensor):
        if rows.shape[0] != 1:
            raise GridError(
                f"a binned search takes one row, not {rows.shape[0]}: use lp_search for several scales"
            )
        rows = Slices.of(rows)
    low, high = rows.ends
    if not torch.isfinite(high - low).all() or high == low:
        return low, high
    mass = rows.histogram(bins).float()[None]
    centres = low + (torch.arange(bins, device=low.device) + 0.5) * ((high - low) / bins)
    fractions = torch.arange(candidates, 0, -1, device=low.device) / candidates
    errors = lp_error(centres.expand(candidates, bins), low * fractions, high * fractions, grid, p, mass)
    chosen = fractions[errors.argmin()]
    return low * chosen, high * chosen


def ema(running: Tensor | None, latest: Tensor, momentum: float) -> Tensor:
    """Exponential moving average; the first value counts whole."""
    return latest if running is None else momentum * running + (1 - momentum) * latest
