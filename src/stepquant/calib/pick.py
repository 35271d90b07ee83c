"""Which steps of which trajectories become calibration records. Steps count from the noisiest (0)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from stepquant.errors import MethodError


class Pick(NamedTuple):
    """One record: trajectory number and step."""

    trajectory: int
    step: int


def one_each(steps: Tensor) -> tuple[Pick, ...]:
    """Trajectory i contributes its state at steps[i]."""
    return tuple(Pick(trajectory, int(step)) for trajectory, step in enumerate(steps))


def spread(steps: Tensor, trajectories: int) -> tuple[Pick, ...]:
    """One record per step, dealt out so that `trajectories` trajectories carry them all and none gives one twice."""
    ordered = sorted(int(step) for step in steps)
    most = max(ordered.count(step) for step in set(ordered)) if ordered else 0
    return tuple(Pick(i % max(trajectories, most), step) for i, step in enumerate(ordered))


def every(trajectories: int, steps: Iterable[int]) -> tuple[Pick, ...]:
    """Every trajectory contributes its states at all of `steps`."""
    chosen = tuple(steps)
    return tuple(Pick(trajectory, step) for trajectory in range(trajectories) for step in chosen)


def strided(steps: int, count: int) -> tuple[int, ...]:
    """`count` steps at equal distances, the last one included; all of them where there are fewer."""
    check(count >= 1, f"a choice of {count} steps")
    count = min(count, steps)
    return tuple(steps - 1 - math.floor(i * steps / count) for i in reversed(range(count)))


def uniform(samples: int, steps: int, generator: Generator) -> Tensor:
    """Steps drawn with equal probability."""
    return torch.randint(steps, (samples,), generator=generator)


def single(samples: int, steps: int, fraction: float) -> Tensor:
    """All records from the one step that lies `fraction` of the noise schedule from the clean image."""
    return torch.full((samples,), step_of_level(fraction, steps))


def normal(
    samples: int, steps: int, mean: float, std: float, generator: Generator, *, clamp: bool = False
) -> Tensor:
    """Steps whose noise level is normally distributed: mean and standard deviation as fractions of all levels.

    Levels outside [0, steps) are drawn again, or moved to the nearest end with `clamp`.
    """
    check(std >= 0, f"a standard deviation of {std}")
    levels = mean * steps + std * steps * torch.randn(samples, generator=generator)
    if not clamp:
        outside = (levels < 0) | (levels >= steps)
        while outside.any():
            again = mean * steps + std * steps * torch.randn(samples, generator=generator)
            levels = torch.where(outside, again, levels)
            outside = (levels < 0) | (levels >= steps)
    return steps - 1 - levels.floor().clamp(0, steps - 1).long()


def step_of_level(fraction: float, steps: int) -> int:
    """The step whose noise level is `fraction` of the way from clean (0) to pure noise (1)."""
    check(0 <= fraction <= 1, f"a noise level of {fraction}")
    return steps - 1 - min(int(fraction * steps), steps - 1)


def check(holds: bool, what: str) -> None:
    if not holds:
        raise MethodError(f"{what} is not possible", fix="choose values inside the sampler's steps")
