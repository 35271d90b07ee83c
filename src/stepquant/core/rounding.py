"""Soft rounding: every weight between the two integers beside it, on a stretched and clipped sigmoid (arXiv:2004.10568)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.core.grid import Grid

LOW, HIGH = -0.1, 1.1  # gamma and zeta: the sigmoid reaches 0 and 1 at finite alpha


def share_up(alpha: Tensor) -> Tensor:
    """How much of the way from the lower to the upper integer: h(V) of Eq. 23, in [0, 1]."""
    return (torch.sigmoid(alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def alpha_of(share: Tensor) -> Tensor:
    """The alpha whose `share_up` is `share`."""
    return torch.logit((share - LOW) / (HIGH - LOW))


def floor_and_fraction(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The lower integer of every weight and what is left above it; `scale` broadcasts against `rows`."""
    scaled = rows * scale.reciprocal()
    floor = torch.floor(scaled)
    return floor, scaled - floor


def enclosing(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The integers below and above every weight, inside the grid, and how much of the way up it is (Eq. 22).

    Where the grid ends, both are the same.
    """
    floor, fraction = floor_and_fraction(rows, scale)
    lower, upper = ((one + zero_point).clamp(grid.qmin, grid.qmax) for one in (floor, floor + 1))
    return lower, upper, fraction


def indecision(share: Tensor, beta: float) -> Tensor:
    """Sum of 1 - |2h - 1|^beta: 0 once every weight sits on an integer (Eq. 24)."""
    return (1 - (2 * share - 1).abs().pow(beta)).sum()


def anneal(progress: float, start: float, end: float) -> float:
    """From `start` to `end` in equal steps as `progress` goes from 0 to 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)
