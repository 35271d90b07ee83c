"""Truth: how near each image is to the nearest legal one, where all legal images are known. It needs no network.

For pictures that are composed of parts, as those of the embedded models are: absolute at any number of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.number import Number
from stepquant.evaluate.metrics.pairs import MOST_DECIBELS
from stepquant.evaluate.metrics.parts import Parts
from stepquant.evaluate.metrics.singles import mean_number, share_number

LEGAL = "legal images"
Percent: TypeAlias = float
BROKEN = 20.0  # decibels: below, the mean error of a pixel is more than a tenth


@dataclass(frozen=True)
class Portion:
    """A kind of parts: its percentage of the area, and of the squared error of each set of images."""

    name: str
    area: Percent
    float: Percent
    quantized: Percent
    other: Percent | None = None


@dataclass(frozen=True)
class Truth:
    """Values of an image: squared error, then pixels, of each kind of parts where it is seen in the nearest legal one."""

    parts: Parts

    @property
    def digest(self) -> str:
        return self.parts.digest

    def check(self, size: tuple[int, int]) -> None:
        """Images of another size than the parts are an error."""
        if tuple(size) != self.parts.size:
            raise EvaluationError(
                "these images are not composed of these parts: their sizes differ",
                got=f"images of {size[1]}x{size[0]}",
                expected=f"{self.parts.size[1]}x{self.parts.size[0]}",
                fix="leave --truth out, or give the parts of this model's images",
            )

    def read(self, images: Tensor, asked: Sequence[Any] = ()) -> Tensor:
        found = self.parts.nearest(images)
        return torch.stack([found.errors, found.seen], 1)

    def numbers(self, values: Mapping[str, Tensor]) -> list[Number]:
        decibels = {name: psnr(found) for name, found in values.items()}
        broken = {name: found < BROKEN for name, found in decibels.items()}
        worst = max(self.portions(values), key=lambda portion: portion.quantized)
        note = (
            f"PSNR to the nearest legal image, then the mean; {worst.quantized:.0f} % of the error is in "
            f"{worst.name}, {worst.area:.0f} % of the area"
        )
        return [
            mean_number("truth", LEGAL, decibels, "dB", self.digest, "", note),
            share_number("broken", LEGAL, broken, "lower", self.digest, f"share below {BROKEN:.0f} dB"),
        ]

    def portions(self, values: Mapping[str, Tensor]) -> list[Portion]:
        """Portions of every kind, in the order of pasting."""
        errors = {name: percent(found[:, 0].sum(0)) for name, found in values.items()}
        area = percent(values["quantized"][:, 1].sum(0))
        return [
            Portion(kind.name, area[i], **{name: found[i] for name, found in errors.items()})
            for i, kind in enumerate(self.parts.kinds)
        ]


def psnr(values: Tensor) -> Tensor:
    """PSNR in decibels, 100 at most."""
    error = values[:, 0].sum(1) / (3 * values[:, 1].sum(1)) / 255**2
    return (-10 * error.log10()).clamp(max=MOST_DECIBELS)


def percent(amounts: Tensor) -> list[float]:
    """Percentages of their sum; 0 where that is 0."""
    return (100 * amounts / amounts.sum().clamp(min=1e-12)).tolist()
