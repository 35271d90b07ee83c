"""Interleaved timing: contenders take turns, so that other work on the machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]


def interleave(
    calls: Mapping[str, Call],
    seconds: float,
    fewest: int = 5,
    most: int = 200,
    untimed: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, float]]:
    """Milliseconds by name, in rounds whose order rotates, for about `seconds`. Each timed call follows `untimed` ones
    of its own: in a sampler's loop a denoiser finds its own tensors in the caches, not another's."""
    names = list(calls)
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < fewest or (time.perf_counter() < end and len(rounds) < most):
        turn = len(rounds) % len(names)
        taken = {}
        for name in names[turn:] + names[:turn]:
            for _ in range(untimed + 1):
                start = clock()
                calls[name]()
                taken[name] = (clock() - start) * 1000
        rounds.append(taken)
    return rounds


def summarize(rounds: Sequence[Mapping[str, float]], name: str, reference: str) -> dict[str, Any]:
    """Quartiles of the time, and of how many times faster than the reference it was in the same round."""
    low, middle, high = quartiles([taken[name] for taken in rounds])
    out: dict[str, Any] = {"milliseconds": middle, "low": low, "high": high}
    if reference in rounds[0]:
        low, middle, high = quartiles([taken[reference] / taken[name] for taken in rounds])
        out |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
    return out


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
