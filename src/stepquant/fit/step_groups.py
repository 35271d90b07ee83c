"""Groups of steps that share a range: which step belongs to which is searched by gradients, for each activation by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepquant.core.grid import Grid
from stepquant.fit.over_time import Seen, Stacked

TOGETHER = 8  # bins that become one while groups are searched; ranges are found on all


def search_groups(
    seen: Sequence[Seen],
    grid: Grid,
    steps: int,
    groups: int,
    *,
    p: float,
    iterations: int,
    rate: float,
    sharpness: float,
) -> Tensor:
    """How much each step belongs to each group, (steps, groups) with rows that sum to 1; every step has been seen.

    Weights and ranges go down the gradient of rounding, where each step errs as its groups do by their weights, and
    entropy is dear.
    """
    found = Stacked.of(seen).coarser(TOGETHER)
    first = grouped_by_width(found, steps, min(groups, steps))
    ranges = [found.of_rows(first == group).one_range(grid, p) for group in range(min(groups, steps))]
    scales, zero_points = (torch.cat(values)[:, None, None] for values in zip(*ranges))
    logits = torch.zeros(steps, len(ranges), device=scales.device, requires_grad=True)
    sizes = torch.zeros_like(scales, requires_grad=True)  # logarithms
    learnt: list[dict[str, Any]] = [{"params": [logits]}, {"params": [sizes], "lr": rate / 5}]
    adam = torch.optim.Adam(learnt, rate)
    before = found.errors(scales, zero_points, grid).mean().clamp(min=1e-30)
    rows = found.rows.to(scales.device)
    with torch.enable_grad():
        for _ in range(iterations):
            adam.zero_grad()
            weights = logits.softmax(1)
            errors = found.errors(scales * sizes.exp(), zero_points, grid)  # (groups, calls)
            entropy = -(weights * weights.clamp(min=1e-30).log()).sum(1).mean()
            loss = (weights[rows].T * errors).sum(0).mean() / before + sharpness * entropy
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
    return logits.detach().softmax(1)


def grouped_by_width(found: Stacked, steps: int, groups: int) -> Tensor:
    """As many steps in each group, from those whose values lie closest together to those that reach furthest."""
    widths = found.centres.abs().amax(1)
    rows = found.rows.to(widths.device)
    widest = widths.new_zeros(steps).scatter_reduce(0, rows, widths, "amax")
    places = torch.empty_like(widest, dtype=torch.int64)
    places[widest.argsort(stable=True)] = torch.arange(steps, device=widths.device) * groups // steps
    return places


def shared_ranges(seen: Sequence[Seen], grid: Grid, weights: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every step: those of least error for all steps whose heaviest group is the same."""
    found, own = Stacked.of(seen), weights.argmax(1)
    made = weights.new_empty(2, len(own))
    for group in own.unique().tolist():
        made[:, own == group] = torch.stack(found.of_rows(own == group).one_range(grid, p))
    return made[0], made[1]


def uncertainty(weights: Tensor) -> Tensor:
    """Entropy of every step's weights, as a share of the greatest that there could be."""
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(1)
    return entropy / math.log(max(weights.shape[1], 2))


def most_uncertain(doubts: Tensor, more: int, even: float) -> list[int]:
    """The steps of so many further records: each where doubts are greatest, less a price for what is chosen already.

    The price is `even` for as many as every step would have on average.
    """
    chosen = torch.zeros(len(doubts), dtype=torch.float64)
    for _ in range(more):
        score = doubts.double().cpu() - even * chosen * len(doubts) / more
        chosen[score.argmax()] += 1
    return torch.arange(len(doubts)).repeat_interleave(chosen.long()).tolist()
