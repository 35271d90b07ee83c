import pytest
import torch
from scipy import stats

from stepquant.calib.pick import every, normal, one_each, single, step_of_level, strided, uniform
from stepquant.errors import MethodError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_strided_equals_counting_back_from_the_last_step() -> None:
    assert strided(10, 5) == (1, 3, 5, 7, 9)
    assert strided(10, 10) == tuple(range(10))
    assert strided(7, 3)[-1] == 6
    assert strided(5, 6) == tuple(range(5))
    with pytest.raises(MethodError):
        strided(5, 0)


def test_normal_levels_follow_the_truncated_normal_distribution() -> None:
    steps = normal(20_000, 1000, 0.4, 0.4, seeded())
    levels = (999 - steps + 0.5) / 1000
    expected = stats.truncnorm(-1, 1.5, loc=0.4, scale=0.4)
    assert stats.kstest(levels.numpy(), expected.cdf).statistic < 0.015


def test_clamped_normal_has_the_masses_of_the_released_code() -> None:
    """15.9 % of the mass lands on the clean end and 6.7 % on the noisy one."""
    steps = normal(50_000, 250, 0.4, 0.4, seeded(), clamp=True)
    assert (steps == 249).float().mean().item() == pytest.approx(stats.norm.cdf(1 / 250 / 0.4 - 1), abs=0.005)
    assert (steps == 0).float().mean().item() == pytest.approx(
        1 - stats.norm.cdf((249 / 250 - 0.4) / 0.4), abs=0.005
    )


def test_small_levels_are_late_steps() -> None:
    """Step 0 is the noisiest; a mean near the clean image picks late steps."""
    assert normal(1000, 100, 0.1, 0.02, seeded()).float().mean() > 80
    assert step_of_level(0, 100) == 99
    assert step_of_level(1, 100) == 0
    assert single(3, 100, 0.25).tolist() == [74, 74, 74]


def test_uniform_covers_all_steps() -> None:
    assert set(uniform(1000, 10, seeded()).tolist()) == set(range(10))


def test_picks() -> None:
    assert one_each(torch.tensor([4, 2])) == ((0, 4), (1, 2))
    assert every(2, (1, 3)) == ((0, 1), (0, 3), (1, 1), (1, 3))
