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


def soft_span(floor: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The lower value of every weight and how far the upper one lies above it, inside the grid (Eq. 22).

    A weight that is `share` of the way up is lower + share * span; where the grid ends, the span is 0.
    """
    low, high = grid.qmin - zero_point, grid.qmax - zero_point
    lower = torch.maximum(torch.minimum(floor, high), low)
    upper = torch.maximum(torch.minimum(floor + 1, high), low)
    return lower * scale, (upper - lower) * scale


def hard_integers(floor: Tensor, up: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Integers of weights of which those in `up` take the upper one."""
    return (floor + up + zero_point).clamp(grid.qmin, grid.qmax)


def indecision(share: Tensor, beta: float) -> Tensor:
    """Sum of 1 - |2h - 1|^beta: 0 once every weight sits on an integer (Eq. 24)."""
    return (1 - (2 * share - 1).abs().pow(beta)).sum()


def anneal(progress: float, start: float, end: float) -> float:
    """From `start` to `end` in equal steps as `progress` goes from 0 to 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)
