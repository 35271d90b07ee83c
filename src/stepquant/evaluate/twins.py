"""Twins: a float pipeline and the quantized one that was made of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stepquant.models.denoiser import Denoiser, by_denoiser


@dataclass(frozen=True)
class Twins:
    """What a quantized pipeline is measured against, and itself."""

    float: Any
    quantized: Any

    def by_denoiser(self) -> list[Twins]:
        """The same once for each denoiser of the pipelines."""
        pairs = zip(by_denoiser(self.float), by_denoiser(self.quantized), strict=True)
        return [Twins(*pair) for pair in pairs]

    @cached_property
    def source(self) -> Denoiser:
        return Denoiser.of(self.float)

    @cached_property
    def other(self) -> Denoiser:
        return Denoiser.of(self.quantized)
