from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.calib.density import (
    Likeness,
    counts,
    dissimilarity,
    features_by_step,
    likeness_of_steps,
    neighbours,
    normalised,
    says_nothing,
    share_out,
    squared_distances,
)
from stepquant.calib.record import Source


def features(steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(steps, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_distances_and_cosines_equal_the_double_loop() -> None:
    f = features(6)
    for i in range(6):
        expected = torch.stack([(f[i] - f[j]).square().mean() for j in range(6)]).double()
        torch.testing.assert_close(squared_distances(Likeness.of(f))[i], expected, rtol=1e-5, atol=1e-6)
        cosines = [torch.cosine_similarity(f[i], f[j], dim=1, eps=1e-6) for j in range(6) if j != i]
        torch.testing.assert_close(
            dissimilarity(Likeness.of(f))[i],
            sum((1 - c).sum() for c in cosines).double(),
            rtol=1e-5,
            atol=1e-5,
        )


def test_neighbours_lie_within_the_radius() -> None:
    f = torch.tensor([0.0, 1.0, 1.1, 5.0]).reshape(4, 1, 1, 1, 1)
    assert neighbours(Likeness.of(f), radius=0.01).tolist() == [0, 1, 1, 0]
    assert neighbours(Likeness.of(f), radius=0.5).tolist() == [2, 2, 2, 0]
    assert neighbours(Likeness.of(f)).tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize("radius", [None, 0.5, 0.9])
def test_the_radius_goes_with_the_scale_of_the_features(radius: float | None) -> None:
    f = features(12)
    f = f + torch.linspace(0, 3, 12).reshape(12, 1, 1, 1, 1)
    wanted = neighbours(Likeness.of(f), radius)
    assert not says_nothing(wanted)
    for scale in (1e-3, 1e3):
        assert torch.equal(neighbours(Likeness.of(scale * f), radius), wanted)


def test_no_step_falls_below_the_floor() -> None:
    f = features(10)
    f[4:7] = f[4]  # dense
    f[9] = 50 * f[9]
    free, kept = (counts(Likeness.of(f), 200, 0.0, floor=floor) for floor in (0.0, 0.5))
    assert int(free.min()) == 0
    assert int(kept.min()) == 10
    assert int(kept.sum()) == 200
    assert kept.argmax() == free.argmax()
    assert counts(Likeness.of(f), 7, 1.2, floor=1.0).sum() == 7


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 500), st.sampled_from(["random", "constant", "ties"]), st.floats(0, 5)
)
def test_counts_sum_to_the_samples(steps: int, samples: int, kind: str, variety: float) -> None:
    f = features(steps)
    if kind == "constant":
        f = torch.ones_like(f)
    elif kind == "ties":
        f = f[torch.arange(steps) // 2]
    shares = counts(Likeness.of(f), samples, variety)
    assert int(shares.sum()) == samples
    assert (shares >= 0).all()


def test_features_that_do_not_vary_give_even_counts() -> None:
    assert counts(Likeness.of(torch.ones(4, 2, 3, 2, 2)), 10, 1.2).tolist() == [3, 3, 2, 2]
    same = torch.randn(16, 64, 4, 4, generator=torch.Generator().manual_seed(0)).expand(20, -1, -1, -1, -1)
    assert counts(Likeness.of(same), 500, 1.2).tolist() == [25] * 20, "rounding decides nothing"
    assert normalised(torch.full((3,), 7.0)).tolist() == [0, 0, 0]


def test_shares_follow_the_score() -> None:
    assert share_out(torch.tensor([3.0, 1.0, 0.0]), 8).tolist() == [6, 2, 0]


def test_features_are_those_of_the_deepest_block(source: Source) -> None:
    """mid_block.attentions.0 of the small model receives 32 channels of 4 x 4 pixels."""
    found = features_by_step(source, range(2))
    assert found.shape == (source.sampling.steps, 2, 32, 4, 4)
    assert squared_distances(Likeness.of(found))[0, 1:].min() > 0


def test_many_trajectories_are_seen_a_few_at_a_time(source: Source) -> None:
    whole, parts = Likeness.of(features_by_step(source, range(11))), likeness_of_steps(source, 11)
    assert (whole.elements, whole.places) == (parts.elements, parts.places)
    torch.testing.assert_close(squared_distances(whole), squared_distances(parts), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dissimilarity(whole), dissimilarity(parts), rtol=1e-4, atol=1e-4)
