"""Groups of steps, against all ways to group them and against ranges by trial."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Generator, Tensor

from stepquant.core.affine import fake_quantize
from stepquant.core.grid import Grid
from stepquant.core.slices import Slices
from stepquant.fit.over_time import Seen, Stacked
from stepquant.fit.step_groups import most_uncertain, search_groups, shared_ranges, uncertainty

STEPS = 6
# Steps of one group lie apart from each other; and each step is a little wider than the one before it.
SPREADS = {"apart": (3, 0.1, 3, 1, 1, 0.1), "growing": (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)}


def activation(kind: str, step: int, sign: str = "") -> Tensor:
    spread = SPREADS[kind][step]
    drawn = spread * torch.randn(2000, generator=Generator().manual_seed(step))
    return drawn + 0.5 * spread if sign == "u" else drawn


def seen(kind: str, sign: str = "") -> list[Seen]:
    return [Seen.of(Slices.of(activation(kind, step, sign)), step, "here") for step in range(STEPS)]


def searched(calls: list[Seen], grid: Grid, iterations: int = 60, sharpness: float = 0.01) -> Tensor:
    return search_groups(calls, grid, STEPS, 2, p=2.0, iterations=iterations, rate=0.05, sharpness=sharpness)


def by_brute_force(calls: list[Seen], grid: Grid) -> tuple[float, float]:
    """The error of the best of all ways to share two ranges, and that of one range for all."""
    stacked = Stacked.of(calls)

    def error(steps: tuple[int, ...]) -> float:
        some = stacked.of_rows(torch.tensor([step in steps for step in range(STEPS)]))
        scale, zero_point = some.one_range(grid, 2.0)
        return float(some.error(scale.expand(len(steps)), zero_point, grid).sum())

    alone = {
        some: error(some)
        for size in range(1, STEPS + 1)
        for some in itertools.combinations(range(STEPS), size)
    }
    every = tuple(range(STEPS))
    best = min(alone[some] + alone[tuple(sorted({*every} - {*some}))] for some in alone if len(some) < STEPS)
    return best, alone[every]


@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("sign", ["", "u"])
def test_the_search_comes_near_the_best_of_all_groupings(kind: str, sign: str) -> None:
    grid, calls = Grid.parse(f"{sign}int4/tensor"), seen(kind, sign)
    weights = searched(calls, grid)
    scales, zero_points = shared_ranges(calls, grid, weights, 2.0)
    assert len(scales.unique()) == 2
    best, one = by_brute_force(calls, grid)
    errors = Stacked.of(calls).errors(scales[:, None], zero_points[:, None], grid)
    assert best * 0.999 < float(errors.sum()) < 1.05 * best
    assert best < 0.8 * one
    if kind == "apart":
        assert len({tuple(weights.argmax(1)[list(some)].tolist()) for some in ((0, 2), (1, 5), (3, 4))}) == 2


def test_a_shared_range_is_the_best_of_those_tried_for_its_steps() -> None:
    grid, calls = Grid.parse("int4/tensor"), seen("growing")
    weights = torch.eye(2)[torch.tensor([0, 0, 0, 1, 1, 1])]
    scales, _ = shared_ranges(calls, grid, weights, 2.0)

    def error(scale: float, steps: range) -> float:
        x = torch.stack([activation("growing", step) for step in steps])
        return float((fake_quantize(x, torch.tensor(scale), torch.zeros(()), grid) - x).square().mean())

    for steps in (range(3), range(3, 6)):
        tried = min(error(scale, steps) for scale in torch.logspace(-2, 0, 300).tolist())
        assert error(float(scales[steps[0]]), steps) < 1.05 * tried


def test_a_step_between_two_groups_is_the_most_uncertain_and_entropy_can_be_dear() -> None:
    grid, calls = Grid.parse("int4/tensor"), seen("growing")
    doubts = uncertainty(searched(calls, grid))
    assert int(doubts.argmax()) == 3, "of the spread 0.6, between 0.1 to 0.4 and 0.8 to 1"
    assert float(uncertainty(searched(calls, grid, sharpness=1.0)).max()) < float(doubts.max())
    even = torch.full((1, 4), 0.25)
    assert float(uncertainty(even)) == pytest.approx(1)
    assert float(uncertainty(torch.tensor([[0.5, 0.5, 0.0, 0.0]]))) == pytest.approx(
        math.log(2) / math.log(4)
    )


def test_more_groups_than_steps_and_no_iterations_leave_each_step_its_own_or_all_the_first() -> None:
    grid, calls = Grid.parse("int8/tensor"), seen("growing")
    weights = search_groups(calls, grid, STEPS, 99, p=2.0, iterations=60, rate=0.05, sharpness=0.01)
    assert weights.shape == (STEPS, STEPS)
    assert torch.equal(searched(calls, grid, iterations=0), torch.full((STEPS, 2), 0.5))


def test_further_records_are_where_doubts_are_but_not_all_in_one_place() -> None:
    doubts = torch.tensor([0.1, 0.5, 0.4, 0.1])
    assert most_uncertain(doubts, 10, 0.0) == [1] * 10
    spread = most_uncertain(doubts, 40, 1.0)
    counts = torch.tensor(spread).bincount(minlength=4).double()
    # Where the price balances the doubt: counts differ as doubts do, 10 records for each unit.
    torch.testing.assert_close(
        counts - counts.mean(), 10 * (doubts - doubts.mean()).double(), rtol=0, atol=1.0
    )
    assert most_uncertain(doubts, 0, 1.0) == []
