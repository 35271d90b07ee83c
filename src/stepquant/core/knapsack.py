"""The multiple-choice knapsack, exactly: one option of every choice, the least total loss within a budget."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from stepquant.errors import EvaluationError

Key = TypeVar("Key")
# Solvers stop within absolute tolerances around 1e-6, so losses are scaled up first.
STRETCH = 1e6
TRIES = 20


def choose(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The option of every choice; the total of `costs` is at most `budget`, that of `losses` the least possible."""
    check_fits(sum(min(options) for options in costs), budget)
    owner = np.repeat(np.arange(len(losses)), [len(options) for options in losses])
    loss = np.concatenate([np.asarray(options, dtype=float) for options in losses])
    cost = np.concatenate([np.asarray(options, dtype=float) for options in costs])
    limit = budget
    for _ in range(TRIES):
        chosen = solve(owner, loss, cost, limit)
        total = math.fsum(cost[chosen])
        if total <= budget:
            first = np.searchsorted(owner, np.arange(len(losses)))
            return [int(place - start) for place, start in zip(chosen, first)]
        limit -= total - budget  # the solver rounded in its own favour
    raise EvaluationError("the budget is too tight for the solver's arithmetic", got=budget)


def shared_out(losses: Mapping[Key, float]) -> dict[Key, float]:
    """Each as its share of all, so that losses of another unit may stand beside them."""
    total = sum(losses.values()) or 1.0
    return {key: loss / total for key, loss in losses.items()}


def check_fits(least: float, budget: float) -> None:
    """Before anything slow begins, too."""
    if least > budget:
        raise EvaluationError(
            "no choice fits the budget",
            got=f"{budget:,.10g}",
            expected=f"at least {least:,.10g}, which every site at its cheapest costs",
            fix="give a larger budget, or study fewer bits",
        )


def solve(owner: np.ndarray, loss: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """The chosen places, one for each owner."""
    count = len(loss)
    one = csr_array((np.ones(count), (owner, np.arange(count))), shape=(int(owner.max()) + 1, count))
    grain = scale_of(cost)
    span = float(np.ptp(loss)) or 1.0
    with nothing_printed():
        found = milp(
            STRETCH * (loss - loss.min()) / span,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(cost[None] / grain, -np.inf, budget / grain),
            ],
            options={"mip_rel_gap": 0.0, "presolve": True},
        )
    if found.x is None:
        raise EvaluationError(f"the solver found no allocation: {found.message}")
    best = np.full(int(owner.max()) + 1, -1)
    for place in np.argsort(found.x):
        best[owner[place]] = place
    return best


@contextmanager
def nothing_printed() -> Iterator[None]:
    """The solver's library writes a line for itself to the standard output of the process, where a user's JSON may go."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def scale_of(cost: np.ndarray) -> float:
    """What costs are counted in: their greatest common divisor where they are whole numbers."""
    integers = cost.astype(np.int64)
    if (integers == cost).all() and cost.max() < 2**53:
        return float(np.gcd.reduce(integers)) or 1.0
    return float(cost.max()) or 1.0
