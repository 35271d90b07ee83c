"""Codebooks: the few integers of a byte that the weights of an output channel may take (Lloyd 1982, Max 1960).

Products are those of bytes: a codebook changes which of them a weight can be, and how few bits name it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127  # every integer lies between this and its negative
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
