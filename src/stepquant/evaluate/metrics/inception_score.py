"""The Inception Score (arXiv:1606.03498): how sure a classifier is of each image, and how many classes a set has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from scipy.special import stdtrit
from torch import Tensor

# Papers average the scores of splits of this many images; that is slightly lower than one score over all images.
SPLIT = 5_000
# Parts of the jackknife that gives the interval.
PARTS = 16


@dataclass(frozen=True)
class Counted:
    """Sums over images of their class probabilities p, and of p log p summed over classes."""

    count: int
    total: Tensor
    negentropy: float

    @classmethod
    def of(cls, logits: Tensor) -> Counted:
        logs = logits.double().log_softmax(1)
        shares = logs.exp()
        return cls(len(logits), shares.sum(0), float((shares * logs).sum()))

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.count + other.count, self.total + other.total, self.negentropy + other.negentropy)


@dataclass(frozen=True)
class ClassSums:
    """Sums of every split, and of the parts for the interval, to which images are dealt in turn."""

    splits: tuple[Counted, ...]
    parts: tuple[Counted, ...]


def add_classes(sums: ClassSums | None, logits: Tensor) -> ClassSums:
    """The sums with the class logits (n, classes) of more images."""
    if sums is None:
        sums = ClassSums((), (Counted(0, torch.zeros(logits.shape[1], dtype=torch.float64), 0.0),) * PARTS)
    splits, seen = sums.splits, sum(split.count for split in sums.splits)
    parts = tuple(part + Counted.of(logits[(i - seen) % PARTS :: PARTS]) for i, part in enumerate(sums.parts))
    room = SPLIT - splits[-1].count if splits else 0
    if room and len(logits):
        splits = (*splits[:-1], splits[-1] + Counted.of(logits[:room]))
    splits += tuple(Counted.of(rows) for rows in logits[room:].split(SPLIT) if len(rows))
    return ClassSums(splits, parts)


def score(some: Counted) -> float:
    """exp of the mean KL divergence of an image's p from the mean p."""
    mean = some.total / some.count
    entropy = -float(torch.special.xlogy(mean, mean).sum())
    return math.exp(some.negentropy / some.count + entropy)


def inception_score(sums: ClassSums) -> float:
    """The mean over splits; a last one of less than half a split counts only where it is alone."""
    full = [split for split in sums.splits if split.count >= SPLIT / 2] or list(sums.splits)
    return sum(map(score, full)) / len(full)


def score_interval(sums: ClassSums) -> tuple[float, float]:
    """A 95 % interval: each part of the images is left out once."""
    value, parts = inception_score(sums), tuple(part for part in sums.parts if part.count)
    if len(parts) < 2:
        return value, value
    left = torch.tensor([score(total(parts[:i] + parts[i + 1 :])) for i in range(len(parts))])
    error = float(((len(parts) - 1) / len(parts) * (left - left.mean()).square().sum()).sqrt())
    half = float(stdtrit(len(parts) - 1, 0.975)) * error
    return max(value - half, 1.0), value + half


def total(parts: Sequence[Counted]) -> Counted:
    return reduce(Counted.__add__, parts)
