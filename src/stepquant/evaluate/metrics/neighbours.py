"""Comparing two sets of features without assuming that they are Gaussian: a kernel distance, and nearest neighbours.

Kernel distance: Binkowski et al., arXiv:1801.01401. Precision and recall: Kynkaanniemi et al., arXiv:1904.06991.
Density and coverage: Naeem et al., arXiv:2002.09797.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows at a time, and pairs at a time: what memory holds does not grow with the number of samples.
CHUNK, PAIRS = 1024, 2**19
# Neighbours, as in the papers.
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5


@dataclass(frozen=True)
class Neighbours:
    """One value for each generated (precision, density) or real (recall, coverage) sample; the metrics are their means."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def rows_at_once(count: int) -> int:
    """How many rows are compared with `count` others at a time."""
    return max(min(CHUNK, PAIRS // max(count, 1)), 1)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """The cubic polynomial kernel of the KID."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The unbiased squared maximum mean discrepancy (KID) and its standard error.

    Taken over all pairs of the first min(len(a), len(b)) samples of both; it may be slightly negative.
    """
    count = min(len(a), len(b))
    a, b = a[:count].double(), b[:count].double()
    at_once = rows_at_once(count)
    rows = torch.cat([paired_rows(a, b, start, at_once) for start in range(0, count, at_once)])
    # A U-statistic of pairs (a_i, b_i): its variance is four times that of its projections, over n.
    return float(rows.mean()), float(2 * rows.std() / count**0.5)


def paired_rows(a: Tensor, b: Tensor, start: int, at_once: int) -> Tensor:
    """Mean over j != i of k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(b_i, a_j), for `at_once` of the i."""
    mine, theirs = a[start : start + at_once], b[start : start + at_once]
    values = kernel(mine, a) + kernel(theirs, b) - kernel(mine, b) - kernel(theirs, a)
    index = torch.arange(len(mine))
    values[index, index + start] = 0
    return values.sum(1) / (len(a) - 1)


def distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double(), compute_mode="use_mm_for_euclid_dist")


def radii(samples: Tensor, neighbours: int) -> Tensor:
    """Distance of each sample to its k-th nearest other one."""
    parts = [distances(part, samples) for part in samples.split(rows_at_once(len(samples)))]
    return torch.cat([part.kthvalue(neighbours + 1, dim=1).values for part in parts])


def compare_neighbours(real: Tensor, fake: Tensor) -> Neighbours:
    """Precision and recall, density and coverage, sample by sample; memory grows with one set only."""
    near_real, wide_real = radii(real, PRECISION_NEIGHBOURS), radii(real, DENSITY_NEIGHBOURS)
    near_fake = radii(fake, PRECISION_NEIGHBOURS)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    precision, density, at_once = [], [], rows_at_once(len(real))
    for part, reach in zip(fake.split(at_once), near_fake.split(at_once)):
        apart = distances(part, real)
        precision.append((apart <= near_real).any(1))
        density.append((apart < wide_real).sum(1) / DENSITY_NEIGHBOURS)
        recalled |= (apart <= reach[:, None]).any(0)
        covered |= (apart < wide_real).any(0)
    return Neighbours(
        torch.cat(precision).double(), recalled.double(), torch.cat(density).double(), covered.double()
    )
