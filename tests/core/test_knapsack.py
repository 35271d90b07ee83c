from __future__ import annotations

import ctypes
import itertools
from random import Random

import numpy as np
import pytest

from stepquant.core.knapsack import choose
from stepquant.errors import EvaluationError


def best_of_all(losses: list[list[float]], costs: list[list[float]], budget: float) -> float:
    """The least loss over every choice there is."""
    found = [
        sum(loss[i] for loss, i in zip(losses, picks))
        for picks in itertools.product(*(range(len(options)) for options in losses))
        if sum(cost[i] for cost, i in zip(costs, picks)) <= budget
    ]
    return min(found)


@pytest.mark.parametrize("seed", range(25))
def test_choice_is_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    shapes = generator.integers(1, 5, size=7)
    scale = 10.0 ** generator.integers(-9, 3)  # losses of any size
    losses = [(scale * generator.random(n)).tolist() for n in shapes]
    costs = [
        generator.integers(1, 10 ** generator.integers(1, 10), size=n).astype(float).tolist() for n in shapes
    ]
    low, high = (sum(end(options) for options in costs) for end in (min, max))
    for share in (0.0, 0.1, 0.4, 0.8, 1.0):
        budget = float(round(low + share * (high - low)))
        picks = choose(losses, costs, budget)
        assert sum(cost[i] for cost, i in zip(costs, picks)) <= budget
        total = sum(loss[i] for loss, i in zip(losses, picks))
        assert total == pytest.approx(best_of_all(losses, costs, budget), rel=1e-9, abs=1e-12 * scale)


def test_costs_may_be_fractions() -> None:
    losses, costs = [[0.0, 1.0], [0.0, 3.0]], [[0.5, 0.25], [0.7, 0.1]]
    assert choose(losses, costs, 0.95) == [1, 0]
    assert choose(losses, costs, 0.6) == [0, 1]


def test_a_budget_that_nothing_fits_names_the_least_one() -> None:
    with pytest.raises(EvaluationError, match="no choice fits") as error:
        choose([[0.0, 1.0], [2.0]], [[9.0, 4.0], [3.0]], 6.5)
    assert "at least 7" in str(error.value)
    assert choose([[0.0, 1.0], [2.0]], [[9.0, 4.0], [3.0]], 7) == [1, 0]


def test_the_solver_says_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """With numbers at which it does, on the standard output."""
    random, bits = Random(0), (2, 3, 4, 5, 6, 8)
    for _ in range(11):
        losses = [[random.random() * 10 / 4**b for b in bits] for _ in range(30)]
        sizes = [random.randint(1000, 300000) for _ in range(30)]
        budget = sum(sizes) * random.uniform(3, 6) / 8
    choose(losses, [[size * b // 8 for b in bits] for size in sizes], budget)
    ctypes.CDLL(None).fflush(None)
    assert not capfd.readouterr().out
