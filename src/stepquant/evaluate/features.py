"""Streaming statistics of image features, and the Frechet distance between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from scipy.special import stdtrit
from torch import Tensor, nn

from stepquant.errors import EvaluationError

REFERENCE_NAME = "reference.safetensors"
# More blocks do not make an interval better, and each holds a square of the feature width: 8 of 2048 are 270 MB.
MOST_BLOCKS, FEWEST_BLOCKS = 64, 8
BLOCK_NUMBERS = 2**25


@dataclass(frozen=True)
class View:
    """One thing that an extractor sees in images, and the numbers about it."""

    name: str  # of its Frechet distance, or of its score
    kernel: str = ""  # name of its kernel distance; without one there are no nearest neighbours either
    suffix: str = ""  # behind the names of precision, recall, density and coverage
    classes: bool = False  # class logits: they have a score of their own instead of distances


class Reader(Protocol):
    """An extractor with all that it sees in one pass."""

    @property
    def digest(self) -> str: ...

    @property
    def resize(self) -> str: ...

    @property
    def views(self) -> tuple[View, ...]: ...

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Rows (n, width) by the name of the view, of images (n, 3, h, w) in [0, 1]."""
        ...


@dataclass(frozen=True)
class Extractor:
    """A network from images (n, 3, size, size) in [0, 1] to features (n, width), and the name of its distance."""

    name: str
    net: nn.Module
    digest: str
    size: int
    resize: str = ""

    @property
    def views(self) -> tuple[View, ...]:
        return (View(self.name, self.name.replace("FD", "KD", 1)),)

    def read(self, images: Tensor) -> dict[str, Tensor]:
        return {self.name: self(images).float()}

    def __call__(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2:] != (self.size, self.size):
            shown = "x".join(str(side) for side in images.shape[1:])
            raise EvaluationError(
                f"{self.name} reads images of 3x{self.size}x{self.size}, these are {shown}",
                fix="measure such images against the float model by PSNR and SSIM",
            )
        with torch.no_grad():
            features: Tensor = self.net(images.float())
        return features


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
    if merge(a).count - max(block.count for block in a) < 2:  # without one block hardly anything is left
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
    without = lambda blocks, i: merge([block for j, block in enumerate(blocks) if j != i])  # noqa: E731
    whole = merge(b)
    left = torch.tensor([frechet(without(a, i), without(b, i) if paired else whole) for i in range(len(a))])
    error = float(((len(a) - 1) / len(a) * (left - left.mean()).square().sum()).sqrt())
    half = float(stdtrit(len(a) - 1, 0.975)) * error  # Student's t
    return max(value - half, 0.0), value + half


@dataclass(frozen=True)
class Split:
    """Sums over all images of a split of real data, and the features of a few of them."""

    statistics: Statistics
    features: Tensor | None = None


def to_tensors(splits: Mapping[str, Split]) -> dict[str, Tensor]:
    """Mean, covariance and count of each split in fp32, features in fp16, as they are stored."""
    out: dict[str, Tensor] = {}
    for name, split in splits.items():
        found = split.statistics
        out |= {
            f"{name}.mean": found.mean.float(),
            f"{name}.covariance": found.covariance.float().contiguous(),
        }
        out[f"{name}.count"] = torch.tensor([found.count])
        if split.features is not None:
            out[f"{name}.features"] = split.features.half().contiguous()
    return out


def read_reference(extractor: Reader, file: Path) -> dict[str, Split]:
    """Stored splits by name; they must have been made by this very extractor."""
    try:
        with safe_open(file, "pt") as stored:
            digest = (stored.metadata() or {}).get("extractor", "none")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"the reference statistics cannot be read: {error}", where=str(file)) from error
    if digest != extractor.digest:
        raise EvaluationError(
            "the reference statistics were made by another extractor",
            where=str(file),
            got=digest,
            expected=extractor.digest,
            fix="make them again: examples/make_reference_statistics.py",
        )
    return {name: to_split(name, tensors) for name in sorted({key.partition(".")[0] for key in tensors})}


def to_split(name: str, tensors: Mapping[str, Tensor]) -> Split:
    count = int(tensors[f"{name}.count"])
    features = tensors.get(f"{name}.features")
    return Split(
        Statistics.from_moments(count, tensors[f"{name}.mean"], tensors[f"{name}.covariance"]),
        None if features is None else features.float(),
    )
