"""Losses between quantized tensors and their float targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """What a block returns, and what the layers inside it return."""

    block: Sequence[Tensor]
    layers: Sequence[Tensor] = ()


def per_sample(out: Tensor, target: Tensor, p: float = 2.0) -> Tensor:
    """For every sample, the sum over channels of |out - target|^p, averaged over pixels or tokens.

    Channels come second in images and last in tokens (three axes).
    """
    difference = out - target
    powers = difference.square() if p == 2 else difference.abs().pow(p)
    summed = powers.sum(-1) if out.ndim == 3 else powers.sum(1)
    return summed.flatten(1).mean(1) if summed.ndim > 1 else summed


@dataclass(frozen=True)
class BlockLoss:
    """The error of the block's outputs plus `layers` times the error of each layer inside."""

    p: float = 2.0
    layers: float = 0.0

    def each(self, out: Outputs, target: Outputs) -> Tensor:
        """One loss per sample."""
        total = sum_losses(out.block, target.block, self.p)
        if self.layers:
            total = total + self.layers * sum_losses(out.layers, target.layers, self.p)
        return total

    def __call__(self, out: Outputs, target: Outputs, weight: Tensor | None = None) -> Tensor:
        losses = self.each(out, target)
        return (losses if weight is None else losses * weight).mean()


def sum_losses(out: Sequence[Tensor], target: Sequence[Tensor], p: float) -> Tensor:
    if not out:
        return torch.zeros(())
    first, *rest = (per_sample(a, b, p) for a, b in zip(out, target, strict=True))
    return sum(rest, first)
