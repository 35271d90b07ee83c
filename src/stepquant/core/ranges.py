"""Ranges: the interval that a grid is stretched over, one per row of values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepquant.core.affine import fake_quantize, scale_and_zero
from stepquant.core.bracket import CACHED, LOOSE, bracket
from stepquant.core.grid import Grid, GridError
from stepquant.core.slices import Slices

Rows = Tensor | Slices  # of slices there is a single row
Search = Callable[[Tensor, Grid], tuple[Tensor, Tensor]]  # rows (n, elements), grid -> low (n,), high (n,)
AT_ONCE = 1 << 22  # elements of rows that are searched together, beside which work by the row costs little
SORTED = 64  # numbers for each of the greatest that torch looks for, or it sorts them all
SlicedSearch = Callable[[Slices, Grid], tuple[Tensor, Tensor]]


def minmax(rows: Rows, grid: Grid) -> tuple[Tensor, Tensor]:
    """The whole range of every row."""
    if isinstance(rows, Slices):
        return rows.ends
    values = rows.float()
    return values.amin(1), values.amax(1)  # `aminmax` of rows takes twenty times as long


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

    Errors are bracketed first, with the help of a row's `outermost` values, and taken exactly where that leaves a choice.
    """
    rows = rows.detach()
    low, high = minmax(rows, grid)
    fractions = torch.arange(candidates, 0, -1, device=rows.device) / candidates
    few = max(AT_ONCE // rows.shape[1], 1)
    parts = zip(rows.split(few), low.split(few), high.split(few))
    chosen = torch.cat([fractions[best_of(*part, fractions, grid, p, outermost)] for part in parts])
    return low * chosen, high * chosen


def best_of(
    rows: Tensor, low: Tensor, high: Tensor, fractions: Tensor, grid: Grid, p: float, outermost: int
) -> Tensor:
    """The place of each row's best fraction; of equal ones the first."""
    least, most = brackets(rows, low, high, fractions, grid, p, outermost)
    possible = ~(least > most.amin(1)[:, None])
    chosen = least.argmin(1)
    possible &= (possible.sum(1) > 1)[:, None]  # where there is one it is known
    best, few = torch.full_like(low, torch.inf), max(CACHED // rows.shape[1], 1)

    def measure(some: Tensor, place: Tensor) -> None:
        for each, at in zip(some.split(few), place.split(few)):
            ends = low[each] * fractions[at], high[each] * fractions[at]
            error = lp_error(rows[each], *ends, grid, p)
            better = (error < best[each]) | ((error == best[each]) & (at < chosen[each]))
            best[each[better]], chosen[each[better]] = error[better], at[better]

    some = possible.any(1).nonzero().flatten()
    measure(some, chosen[some])
    for place in possible.any(0).nonzero().flatten().cpu().tolist():
        hopeful = possible[:, place] & (chosen != place) & ~(least[:, place] > best)
        some = hopeful.nonzero().flatten()
        measure(some, torch.full_like(some, place))
    return chosen


def brackets(
    rows: Tensor, low: Tensor, high: Tensor, fractions: Tensor, grid: Grid, p: float, outermost: int
) -> tuple[Tensor, Tensor]:
    """(rows, fractions) between which the errors lie; infinite from the fraction on that clips the ends too much."""
    wanted = outermost * max(128 // grid.levels, 1)  # wide steps repay it to clip more
    count = max(min(wanted, rows.shape[1] // SORTED), 1)
    extremes = rows.gather(1, rows.abs().topk(count, dim=1, sorted=False).indices)
    least, most = torch.full((2, len(rows), len(fractions)), torch.inf, device=rows.device)
    magnitudes, upper = extremes.abs(), torch.full_like(low, torch.inf)
    for place, fraction in enumerate(fractions.cpu().tolist()):
        ends = low * fraction, high * fraction
        if (clipped_alone(magnitudes, *ends, grid, p) > upper).all():
            break  # and more so the fractions that clip more
        least[:, place], most[:, place] = bracket(rows, extremes, *ends, grid, p)
        upper = torch.minimum(upper, most[:, place])
    return least, most


def clipped_alone(magnitudes: Tensor, low: Tensor, high: Tensor, grid: Grid, p: float) -> Tensor:
    """What these numbers at least add to the error of a row because no number of the grid is as large."""
    scale, zero_point = scale_and_zero(low, high, grid)
    reach = torch.maximum(grid.qmax - zero_point, zero_point - grid.qmin) * scale
    if not grid.symmetric:
        reach += scale  # the zero point of another fraction may be rounded another way
    return (magnitudes * (1 - LOOSE / 100) - reach[:, None]).clamp(min=0).pow(p).sum(1)


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
