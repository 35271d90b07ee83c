"""Losses between quantized tensors and their float targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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


def along_sample(out: Tensor, target: Tensor) -> Tensor:
    """For every sample, the part of `per_sample` that the error has along the target: what shrinks it, or makes it grow."""
    error, wanted = (out - target).flatten(1), target.flatten(1)
    parallel = (error * wanted).sum(1).square() / wanted.square().sum(1).clamp(min=1e-12)
    channels = target.shape[-1] if target.ndim == 3 else target.shape[1]
    return parallel * channels / wanted.shape[1]


@dataclass(frozen=True)
class BlockLoss:
    """The error of the block's outputs plus `layers` times the error of each layer inside.

    What of the outputs' error lies along their targets counts `along` times more.
    """

    p: float = 2.0
    layers: float = 0.0
    along: float = 0.0

    def each(self, out: Outputs, target: Outputs) -> Tensor:
        """One loss per sample."""
        powers = partial(per_sample, p=self.p)
        total = sum_losses(out.block, target.block, powers)
        if self.along:
            total = total + self.along * sum_losses(out.block, target.block, along_sample)
        if self.layers:
            total = total + self.layers * sum_losses(out.layers, target.layers, powers)
        return total

    def __call__(self, out: Outputs, target: Outputs, weight: Tensor | None = None) -> Tensor:
        losses = self.each(out, target)
        return (losses if weight is None else losses * weight).mean()


def sum_losses(
    out: Sequence[Tensor], target: Sequence[Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    if not out:
        return torch.zeros(())
    first, *rest = (loss(a, b) for a, b in zip(out, target, strict=True))
    return sum(rest, first)
