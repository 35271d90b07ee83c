"""What is learnt while a block is reconstructed: the rounding of its weights and the steps of its activations."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from stepquant.core.affine import dequantize, fake_quantize_ste, to_groups
from stepquant.core.rounding import alpha_of, floor_and_fraction, hard_integers, share_up, soft_values
from stepquant.quant.quantizer import Quantizer


class FixedRounding:
    """Every weight takes the lower integer, or the upper one where `up` says so."""

    def __init__(self, up: Tensor) -> None:
        self.up = up

    def values(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        scale, zero_point = quantizer.range()
        rows = to_groups(self.integers(weight, quantizer), quantizer.grid)
        return dequantize(rows, scale[:, None], zero_point[:, None]).reshape(weight.shape).to(weight.dtype)

    def integers(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        scale, zero_point = quantizer.range()
        floor, _ = floor_and_fraction(to_groups(weight.detach().float(), quantizer.grid), scale[:, None])
        up = self.up.reshape(floor.shape).to(floor.dtype)
        return hard_integers(floor, up, zero_point[:, None], quantizer.grid).reshape(weight.shape)


class SoftRounding:
    """Rounding by a learnable `alpha` per weight; at its start the weights are what they were in float."""

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        scale, zero_point = (value[:, None] for value in quantizer.range())
        self.scale, self.zero_point, self.grid = scale, zero_point, quantizer.grid
        rows = to_groups(weight.detach().float(), quantizer.grid)
        self.floor, self.fraction = floor_and_fraction(rows, scale)
        self.alpha = alpha_of(self.fraction).requires_grad_()
        self.hard = False
        self.share = self.fraction

    def values(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        if self.hard:
            return self.fixed().values(weight, quantizer)
        self.share = share_up(self.alpha)
        rows = soft_values(self.floor, self.share, self.scale, self.zero_point, self.grid)
        return rows.reshape(weight.shape).to(weight.dtype)

    def integers(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        return self.fixed().integers(weight, quantizer)

    def fixed(self) -> FixedRounding:
        return FixedRounding(self.alpha.detach() >= 0)


class LearnedStep:
    """A step that is learnt as a factor of its start; while training only a part of the elements is quantized.

    A factor, because one learning rate then fits sites whose steps differ by orders of magnitude.
    """

    def __init__(self, quantizer: Quantizer, keep: float, generator: Generator) -> None:
        self.start, self.zero_point = quantizer.range()
        self.factor = torch.ones_like(self.start).requires_grad_()
        self.keep, self.generator, self.training = keep, generator, True

    @property
    def scale(self) -> Tensor:
        return self.start * self.factor.clamp(min=0.01)

    def __call__(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        out = fake_quantize_ste(x, self.scale, self.zero_point, quantizer.grid)
        if not self.training or self.keep >= 1:
            return out
        return torch.where(torch.rand(x.shape, generator=self.generator) < self.keep, out, x)
