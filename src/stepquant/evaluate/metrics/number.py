"""Number: one measured value with its interval, unit and reference, as results hold it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

SAME_SEEDS = "float, same seeds"
OTHER_SEEDS = "float, other seeds"


@dataclass(frozen=True)
class Number:
    """One measured value and all that is needed to read it, or the reason why there is none.

    `floor` is the same number with the float model on other seeds in the quantized model's place;
    `reference`, against data, that of the float model on the same seeds. `change_low` to `change_high` is an interval of
    value less reference: narrower than the value's own, since both owe the same to the seeds.
    """

    name: str
    against: str
    n: int
    better: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    reference: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    floor: float | None = None
    floor_of: str = ""
    extractor: str = ""  # digest of the network that measured
    resize: str = ""  # what was done to the images before it
    note: str = ""
    unavailable: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mean_interval(values: Tensor, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            values[torch.randint(len(values), (len(values),), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def unavailable(name: str, against: str, why: str, better: str = "lower") -> Number:
    return Number(name, against, 0, better, unavailable=why)
