"""Readers: networks from images to features, and which metrics each kind of features serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from stepquant.errors import EvaluationError


@dataclass(frozen=True)
class View:
    """One kind of features of an extractor, and the names of the metrics made of it."""

    name: str  # of its Frechet distance, or of its score
    kernel: str = ""  # name of its kernel distance; without one there are no nearest neighbours either
    suffix: str = ""  # behind the names of precision, recall, density and coverage
    classes: bool = False  # class logits: they have a score of their own instead of distances


class Reader(Protocol):
    """An extractor whose views all come from one forward pass."""

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
