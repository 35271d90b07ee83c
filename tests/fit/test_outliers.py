"""Ends, D and groups against loops over everything and against all partitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from stepquant.fit.outliers import Ends, factors_of, groups_of, spread_of


def seen(*batches: Tensor) -> Ends:
    found = Ends()
    for x in batches:
        found.add(x)
    return found


@pytest.mark.parametrize("where", ["channel", "token"])
def test_outliers_lie_where_ends_differ_most(where: str) -> None:
    x = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    x[..., 2] *= 9 if where == "channel" else 1
    x[:, 3] *= 1 if where == "channel" else 9
    found = seen(x[:2], x[2:])
    channels = [(min(x[..., c].flatten().tolist()), max(x[..., c].flatten().tolist())) for c in range(4)]
    tokens = [(min(x[:, t].flatten().tolist()), max(x[:, t].flatten().tolist())) for t in range(6)]
    for known, expected in ((found.channels, channels), (found.tokens, tokens)):
        assert known is not None
        assert known.T.tolist() == [list(pair) for pair in expected]
        lows, highs = zip(*expected)
        assert spread_of(known) == pytest.approx(max(highs) - min(highs) + max(lows) - min(lows), rel=1e-5)
    assert found.in_tokens == (where == "token")


def test_tokens_of_other_numbers_have_no_places() -> None:
    x = torch.ones(2, 6, 4)
    x[:, 3] = 9
    assert seen(x).in_tokens
    assert not seen(x, x[:, :5]).in_tokens
    assert not seen(x[:, 3]).in_tokens


def within(points: list[list[float]], labels: tuple[int, ...]) -> float:
    """Squared distances to the means of the groups."""
    total = 0.0
    for group in set(labels):
        mine = [point for point, label in zip(points, labels) if label == group]
        for values in zip(*mine):
            total += sum((value - sum(values) / len(values)) ** 2 for value in values)
    return total


def test_groups_are_the_best_partition_of_all() -> None:
    low = torch.tensor([-1.0, -1.1, -0.9, -6.0, -6.3, -1.0, -2.9])
    high = torch.tensor([1.0, 0.9, 1.1, 5.0, 5.2, 9.0, 8.7])
    labels = groups_of(torch.stack([low, high]), 3)
    points = [list(pair) for pair in zip(low.tolist(), high.tolist())]
    least = min(within(points, (0, *others)) for others in itertools.product(range(3), repeat=6))
    assert within(points, tuple(labels.tolist())) == pytest.approx(least, rel=1e-6)
    assert len(groups_of(torch.stack([low, high]), 99).unique()) == 7


def test_every_group_reaches_as_far_as_all_do_and_no_further() -> None:
    found = torch.tensor([[-1.0, -2.0, -0.5, 0.0, 0.0], [4.0, 1.0, 0.25, 2.0, 0.0]])
    factors = factors_of(found, torch.tensor([0, 1, 1, 2, 3]))
    reached = found * factors
    assert factors.tolist() == [1.0, 1.0, 1.0, 2.0, 1.0]  # the last reads nothing but zeros
    assert reached.amin() >= -2.0
    assert reached.amax() <= 4.0
    for group in ([0], [1, 2], [3]):
        assert reached[0, group].min() == -2.0 or reached[1, group].max() == 4.0
