"""Streaming statistics of image features, and the Frechet distance between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from scipy.special import stdtrit
from torch import Tensor

from stepquant.errors import EvaluationError

# More blocks do not make an interval better, and each holds a square of the feature width: 8 of 2048 are 270 MB.
MOST_BLOCKS, FEWEST_BLOCKS = 64, 8
BLOCK_NUMBERS = 2**25


@dataclass(frozen=True)
class Statistics:
    """Sums over features in float64, so that shards of any size merge to the statistics of the whole."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        rows = features.double().flatten(1)
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    @classmethod
    def from_moments(cls, count: int, mean: Tensor, covariance: Tensor) -> Statistics:
        mean = mean.double()
        return cls(count, mean * count, covariance.double() * (count - 1) + torch.outer(mean, mean) * count)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        if self.count < 2:
            raise EvaluationError(
                "a covariance needs two images", got=self.count, fix="give --images a larger number"
            )
        return (self.outer - torch.outer(self.total, self.mean)) / (self.count - 1)


Interval = tuple[float, float] | tuple[None, None]


def merge(blocks: Sequence[Statistics]) -> Statistics:
    return reduce(Statistics.__add__, blocks)


def add_block(blocks: tuple[Statistics, ...], new: Statistics) -> tuple[Statistics, ...]:
    """The blocks with one more; neighbours merge when there are too many, so memory does not grow with images."""
    blocks = (*blocks, new)
    if len(blocks) <= most_blocks(len(new.total)):
        return blocks
    return tuple(merge(blocks[start : start + 2]) for start in range(0, len(blocks), 2))


def most_blocks(width: int) -> int:
    """How many blocks of that width are kept: the wider, the fewer."""
    return min(max(BLOCK_NUMBERS // width**2, FEWEST_BLOCKS), MOST_BLOCKS)


def frechet(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))."""
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # cov_a cov_b is similar to root cov_b root, which is symmetric: its eigenvalues are real and not negative.
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(float(distance), 0.0)


def frechet_interval(
    a: Sequence[Statistics], b: Sequence[Statistics], *, paired: bool, resamples: int = 100, seed: int = 0
) -> Interval:
    """A 95 % interval around the distance: blocks of images are drawn again with replacement; none of one block.

    A resample holds fewer distinct images and so lies higher: the spread is kept and centred on the distance.
    `paired` draws the same blocks of both, whose images come from the same seeds.
    """
    if paired and len(a) != len(b):
        raise EvaluationError("paired statistics need the same blocks", got=len(b), expected=len(a))
    if not has_others(a):
        return None, None
    value = frechet(merge(a), merge(b))
    if most_blocks(len(a[0].total)) < MOST_BLOCKS:
        return jackknife_interval(value, a, b, paired=paired)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(resamples):
        chosen = torch.randint(len(a), (len(a),), generator=generator).tolist()
        others = chosen if paired else torch.randint(len(b), (len(b),), generator=generator).tolist()
        found.append(frechet(merge([a[i] for i in chosen]), merge([b[i] for i in others])))
    spread = torch.tensor(found, dtype=torch.float64)
    low, high = torch.quantile(
        spread - spread.mean(), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return max(value + low, 0.0), value + high


def jackknife_interval(
    value: float, a: Sequence[Statistics], b: Sequence[Statistics], *, paired: bool
) -> tuple[float, float]:
    """The same interval where one distance takes seconds: each block of images is left out once.

    Unpaired, only the blocks of `a` are: those of `b` are many more, or are one.
    """
    other = merge(b)
    half = half_width([frechet(without(a, i), without(b, i) if paired else other) for i in range(len(a))])
    return max(value - half, 0.0), value + half


def change_interval(a: Sequence[Statistics], own: Sequence[Statistics], target: Statistics) -> Interval:
    """A 95 % interval of how much farther `a` lies from the target than `own`, whose images come from the same seeds.

    Each block is left out of both at once (jackknife), so that what both owe to the seeds cancels.
    """
    if not has_others(a):
        return None, None
    change = frechet(merge(a), target) - frechet(merge(own), target)
    left = [frechet(without(a, i), target) - frechet(without(own, i), target) for i in range(len(a))]
    half = half_width(left)
    return change - half, change + half


def has_others(blocks: Sequence[Statistics]) -> bool:
    """Whether, without any one block, enough is left for a covariance."""
    return merge(blocks).count - max(block.count for block in blocks) >= 2


def without(blocks: Sequence[Statistics], i: int) -> Statistics:
    return merge([block for j, block in enumerate(blocks) if j != i])


def half_width(left: Sequence[float]) -> float:
    """Half of a jackknife's interval, of what is found without each block."""
    values = torch.tensor(left, dtype=torch.float64)
    error = float(((len(left) - 1) / len(left) * (values - values.mean()).square().sum()).sqrt())
    return float(stdtrit(len(left) - 1, 0.975)) * error  # Student's t
