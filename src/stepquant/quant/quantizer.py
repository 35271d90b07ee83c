"""Quantizer: the module that holds a grid, its scales and zero points at one site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stepquant.core.affine import fake_quantize
from stepquant.core.grid import Grid
from stepquant.errors import RangeError

Port = Literal["weight", "input", "query", "key", "value", "probabilities"]
Observer = Callable[["Quantizer", Tensor], None]
StandIn = Callable[["Quantizer", Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """Where a quantizer sits: a layer, what it is for, and which of its tensors is meant."""

    path: str
    role: str
    port: Port

    def __str__(self) -> str:
        return f"{self.path}:{self.port}"


class Quantizer(nn.Module):
    """Identity until enabled; then the fake quantization of its grid. Ranges are set, never guessed."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, site: Site) -> None:
        super().__init__()
        self.grid, self.site = grid, site
        self.enabled = False
        self.observer: Observer | None = None
        self.stand_in: StandIn | None = None  # quantizes instead, while its step is learnt
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0))

    @property
    def is_set(self) -> bool:
        return self.scale.numel() > 0

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Scales and zero points, one per row that the grid shares them over."""
        if not (torch.isfinite(scale).all() and torch.isfinite(zero_point).all() and (scale > 0).all()):
            raise RangeError(
                f"the range of '{self.site}' is not finite and positive",
                got=f"scale {scale.min().item():g} to {scale.max().item():g}",
                fix="look for NaN or infinite activations in the float model at this layer",
            )
        self.scale = scale.detach().float().reshape(-1).clone()
        self.zero_point = zero_point.detach().float().reshape(-1).clone()

    def range(self) -> tuple[Tensor, Tensor]:
        if not self.is_set:
            raise RangeError(
                f"quantizer '{self.site}' is used before its range is set",
                fix="set ranges from calibration data first (fit.ranges)",
            )
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self, x)
        if not self.enabled:
            return x
        if self.stand_in is not None:
            return self.stand_in(self, x)
        scale, zero_point = self.range()
        return fake_quantize(x, scale, zero_point, self.grid)

    def extra_repr(self) -> str:
        return f"{self.site} {self.grid}"
