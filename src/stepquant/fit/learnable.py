"""What is learnt while a block is reconstructed: the rounding of its weights, or the weights, and the scales of activations."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import TracebackType

import torch
from torch import Generator, Tensor

from stepquant.core.affine import fake_quantize_ste, to_groups
from stepquant.core.levels import Levels
from stepquant.core.mapped import beside
from stepquant.core.rounding import alpha_of, share_up
from stepquant.quant.layers import QuantLayer, Rounding, from_integers
from stepquant.quant.quantizer import ALL, Quantizer

NEAR = 0.499  # of a gap: as far from its integer a weight begins at most


class FixedRounding:
    """Every weight takes the lower integer, or the upper one where `up` says so."""

    def __init__(self, up: Tensor) -> None:
        self.up = up

    def values(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        return from_integers(self.integers(weight, quantizer), quantizer).to(weight.dtype)

    def integers(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        lower, upper, _ = quantizer.levels.enclosing(to_groups(weight.detach().float(), quantizer.grid))
        return torch.where(self.up.reshape(lower.shape), upper, lower).reshape(weight.shape)


class FixedIntegers:
    """Every weight takes the integer that it is given."""

    def __init__(self, given: Tensor) -> None:
        self.given = given.to(torch.int16)

    def values(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        return from_integers(self.integers(weight, quantizer), quantizer).to(weight.dtype)

    def integers(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        return self.given.float().reshape(weight.shape)


def kept(rounding: FixedRounding | FixedIntegers, layer: QuantLayer) -> Rounding:
    """A rounding that stays, where the weight lies."""
    if isinstance(rounding, FixedRounding):
        rounding.up = beside(layer.weight, rounding.up)
    else:
        rounding.given = beside(layer.weight, rounding.given)
    return rounding


class SoftRounding:
    """Rounding by a learnable `alpha` per weight; at its start the weights are what they were in float."""

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        scale, zero_point = (value[:, None] for value in quantizer.range())
        lower, upper, fraction = quantizer.levels.enclosing(
            to_groups(weight.detach().float(), quantizer.grid)
        )
        # Eq. 22, inside the grid: lower + share * span; where the grid ends, the span is 0.
        self.low, self.span = (lower - zero_point) * scale, (upper - lower) * scale
        self.alpha = alpha_of(fraction).requires_grad_()
        self.hard = False
        self.share = fraction

    def values(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        if self.hard:
            return self.fixed().values(weight, quantizer)
        self.share = share_up(self.alpha)
        return torch.addcmul(self.low, self.share, self.span).reshape(weight.shape).to(weight.dtype)

    def integers(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        return self.fixed().integers(weight, quantizer)

    def fixed(self) -> FixedRounding:
        return FixedRounding(self.alpha.detach() >= 0)


class LearnedWeight:
    """A weight that is learnt through its rounding (straight-through), and with it its scales, as factors of their start.

    It begins with the integers that it has. What is learnt of it is a change in units of its scales; or, with a `rank`,
    two thin matrices whose product is added to it, and which are rounded with it: no branch is left beside the integers.
    """

    def __init__(self, layer: QuantLayer, rank: int, generator: Generator) -> None:
        quantizer = layer.weight_quantizer
        assert quantizer is not None, "a weight without a quantizer has nothing to be learnt for"
        levels, weight = quantizer.levels, to_groups(layer.weight.detach().float(), quantizer.grid)
        if layer.rounding is not None:
            chosen = to_groups(layer.weight_integers(), quantizer.grid)
            ends = (chosen - levels.zero_point + NEAR * gap for gap in levels.gaps_beside(chosen))
            low, high = (end * levels.scale for end in ends)
            weight = torch.minimum(torch.maximum(weight, low), high)
        self.start, self.weight, self.shape = levels, weight, layer.weight.shape
        self.gaps = levels.gaps()
        self.factor = torch.ones_like(levels.scale).requires_grad_()
        self.typical = float(self.gaps.mean())
        if rank:
            outputs, inputs = len(layer.weight), layer.weight[0].numel()
            few = min(rank, outputs, inputs)
            down = torch.randn(few, inputs, generator=generator).to(weight) / few**0.5
            self.changes = [down.requires_grad_(), weight.new_zeros(outputs, few).requires_grad_()]
        else:
            self.changes = [torch.zeros_like(weight).requires_grad_()]

    @property
    def levels(self) -> Levels:
        return replace(self.start, scale=self.start.scale * self.factor.clamp(min=0.01))

    def changed(self) -> Tensor:
        """The weight in rows of its grid, not rounded."""
        if len(self.changes) == 1:
            return self.weight + self.changes[0] * self.gaps
        down, up = self.changes
        return self.weight + (up @ down).reshape(self.weight.shape) * self.typical

    def values(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        return self.levels.through(self.changed()).reshape(self.shape).to(weight.dtype)

    def integers(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        with torch.no_grad():
            return self.levels.integers(self.changed()).reshape(self.shape)

    def settle(self, layer: QuantLayer) -> None:
        """Make it what the layer has."""
        assert layer.weight_quantizer is not None
        integers = self.integers(layer.weight, layer.weight_quantizer)
        layer.weight_quantizer.set_range(self.levels.scale, self.levels.zero_point)
        layer.rounding = kept(FixedIntegers(integers), layer)


class LearnedScale:
    """A scale that is learnt as a factor of its start; while training only a part of the elements is quantized.

    A factor, because one learning rate then fits sites whose scales differ by orders of magnitude.
    """

    def __init__(self, quantizer: Quantizer, keep: float, generator: Generator) -> None:
        self.start, self.zero_point = quantizer.range()
        self.factor = torch.ones_like(self.start).requires_grad_()
        self.keep, self.generator, self.training = keep, generator, True

    @property
    def scale(self) -> Tensor:
        return self.start * self.factor.clamp(min=0.01)

    def __call__(
        self, quantizer: Quantizer, x: Tensor, part: slice = ALL, total: int | None = None
    ) -> Tensor:
        chosen = None
        if self.training and self.keep < 1:
            chosen = draw(x.shape, self.keep, self.generator).to(x.device)
        scale, zero_point = self.scale, self.zero_point
        if quantizer.has_rows:
            scale, zero_point = (quantizer.spread(values, x, part, total) for values in (scale, zero_point))
        moved = partial(quantizer.moved, part=part, total=total) if quantizer.grid.codebook else None
        return fake_quantize_ste(x, scale, zero_point, quantizer.grid, chosen, moved)

    def again(self) -> Rewound:
        return Rewound(self.generator)


class Rewound(AbstractContextManager[None]):
    """In there the generator is where it was when this was made."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.then = self.now = generator.get_state()

    def __enter__(self) -> None:
        self.now = self.generator.get_state()
        self.generator.set_state(self.then)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.generator.set_state(self.now)


def draw(shape: torch.Size, probability: float, generator: Generator) -> Tensor:
    """True with that probability, to 1/256: a byte for each element, because random numbers are what it costs."""
    words = torch.empty(-(-shape.numel() // 8), dtype=torch.int64).random_(
        -(2**63), None, generator=generator
    )
    return (words.view(torch.uint8)[: shape.numel()] < round(probability * 256)).reshape(shape)
