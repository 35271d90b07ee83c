"""Codebooks: the few integers of a byte that the weights of an output channel, or an activation, may take.

Products are those of bytes: a codebook changes which of them a number can be, and how few bits name it. Those of weights are
found by Lloyd's rounds (1982; Max 1960), those of activations, of which a histogram over bytes is enough, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127  # every integer of a weight lies between this and its negative
BYTES = 256
ROUNDS = 100  # at most; numbers that lie as weights do are done after a few dozen


def codebook_of(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A scale for each row, and the `count` integers, in order, by which its squared error is least where Lloyd ends."""
    rows = rows.float()
    first, second = (lloyd_max(rows, start) for start in (by_mass(rows, count), by_width(rows, count)))
    errors = [(rows - nearest(rows, levels)).square().sum(1, keepdim=True) for levels in (first, second)]
    levels = torch.where(errors[0] <= errors[1], first, second)
    scale = levels.abs().amax(1) / MOST
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    return scale, (levels / scale[:, None]).round().clamp(-MOST, MOST)


def by_mass(rows: Tensor, count: int) -> Tensor:
    """Levels between which lie as many numbers each."""
    places = ((torch.arange(count, device=rows.device) + 0.5) / count * rows.shape[1]).long()
    return rows.sort(1).values[:, places]


def by_width(rows: Tensor, count: int) -> Tensor:
    """Levels at equal distances."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    return low + (high - low) * (torch.arange(count, device=rows.device) + 0.5) / count


def lloyd_max(rows: Tensor, levels: Tensor) -> Tensor:
    """Numbers go to their nearest level, levels to the mean of their numbers, until nothing moves; one without any stays."""
    for _ in range(ROUNDS):
        cells = codes_of(rows, levels)
        sums = torch.zeros_like(levels).scatter_add_(1, cells, rows)
        counts = torch.zeros_like(levels).scatter_add_(1, cells, torch.ones_like(rows))
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), levels).sort(1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def codes_of(rows: Tensor, levels: Tensor) -> Tensor:
    """Which level each number is nearest to; of two that are as near, the lower."""
    between = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(between.contiguous(), rows.contiguous())


def nearest(rows: Tensor, levels: Tensor) -> Tensor:
    return levels.gather(1, codes_of(rows, levels))


def enclosing(rows: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The levels below and above each number, and how much of the way up it is; at the ends both are the last."""
    above = torch.searchsorted(levels.contiguous(), rows.contiguous(), right=True)
    last = levels.shape[1] - 1
    lower, upper = (levels.gather(1, place.clamp(0, last)) for place in (above - 1, above))
    gap = upper - lower
    return lower, upper, torch.where(gap > 0, (rows - lower) / gap.clamp(min=1), torch.zeros_like(rows))


def best_bytes(counts: Tensor, count: int, zero_point: int) -> Tensor:
    """The `count` bytes, in order, to which bytes that occur so often are moved with the least squared error, where one of
    them is that of zero.

    By dynamic programming over where the bytes that go to one of them end (Wu 1991), from both sides of zero's: exact.
    """
    mass = counts.double().cpu()
    values = torch.arange(len(mass), dtype=torch.float64)
    sums = [torch.cat([mass.new_zeros(1), (mass * values**power).cumsum(0)]) for power in (0, 1, 2)]
    # Of the bytes from that of the row to before that of the column.
    weight, first, second = (total[None] - total[:, None] for total in sums)
    level = torch.where(weight > 0, (first / weight).round(), float(zero_point))
    error, own = (second - 2 * at * first + at**2 * weight for at in (level, float(zero_point)))
    never = torch.full_like(error, torch.inf).tril(-1)  # a cell that ends before it begins
    error, own = error.clamp(min=0) + never, own.clamp(min=0) + never
    below, ends = cells(error, count - 1)
    above, starts = cells(error.flip(0, 1).T, count - 1)
    totals = [x[:, None] + own + y.flip(0) for x, y in zip(below, reversed(above))]
    few = min(range(count), key=lambda place: float(totals[place].min()))
    begin, end = divmod(int(totals[few].argmin()), len(mass) + 1)
    found = [zero_point] * count
    for place in reversed(range(few)):
        since = int(ends[place][begin])
        found[place], begin = (int(level[since, begin]) if since < begin else zero_point), since
    for place in reversed(range(count - 1 - few)):
        until = len(mass) - int(starts[place][len(mass) - end])
        found[count - 1 - place], end = (int(level[end, until]) if end < until else zero_point), until
    return torch.tensor(sorted(found), dtype=torch.float32)


def cells(error: Tensor, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """For no cell to `most`: the least error of the first bytes in so many; and where the last of them begins, but for none."""
    least, begins = [torch.full_like(error[0], torch.inf)], []
    least[0][0] = 0
    for _ in range(most):
        errors, begin = (least[-1][:, None] + error).min(0)
        least.append(errors)
        begins.append(begin)
    return least, begins


def evenly(count: int, zero_point: int) -> Tensor:
    """Bytes at equal distances, but for that of zero."""
    levels = torch.linspace(0, BYTES - 1, count).round()
    levels[(levels - zero_point).abs().argmin()] = zero_point
    return levels


def tables_of(codebook: Tensor) -> Tensor:
    """What each of the 256 bytes is moved to, a row for each codebook: the nearest; of two that are as near, the lower."""
    every = torch.arange(BYTES, dtype=codebook.dtype, device=codebook.device).expand(len(codebook), -1)
    return nearest(every, codebook)


class ThroughCodebook(torch.autograd.Function):
    """Numbers on the levels of their row; gradients pass to them where they are between the ends, and to their scales."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        scaled = x * scale.reciprocal()
        level = nearest(scaled, levels)
        inside = (scaled >= levels[:, :1]) & (scaled <= levels[:, -1:])
        ctx.save_for_backward(inside, level - scaled * inside)
        return level * scale

    @staticmethod
    def backward(ctx, slope_out: Tensor):  # type: ignore[no-untyped-def, override]
        inside, slope = ctx.saved_tensors
        of_scale = (slope_out * slope).sum(1, keepdim=True) if ctx.needs_input_grad[1] else None
        return slope_out * inside if ctx.needs_input_grad[0] else None, of_scale, None
