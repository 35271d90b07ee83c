"""QuantLayer: a float convolution or linear with a quantizer on its input and one on its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.affine import dequantize, to_groups
from stepquant.core.low_rank import LowRank
from stepquant.core.precision import loses_gradients
from stepquant.core.rotation import rotate
from stepquant.models.causal import border_of, bordered
from stepquant.models.split import part_like
from stepquant.quant.quantizer import Quantizer


class Rounding(Protocol):
    """How weights become integers when it is not to the nearest: learned per weight."""

    def values(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        """Weights on (or, while learning, near) the grid, in the shape of `weight`."""
        ...

    def integers(self, weight: Tensor, quantizer: Quantizer) -> Tensor: ...


class QuantLayer(nn.Module):
    """Stands in for `layer`, or a table of embeddings, whose float weight it keeps; both quantizers may be absent."""

    def __init__(
        self,
        layer: nn.Module,
        role: str,
        weight_quantizer: Quantizer | None,
        input_quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.role = layer, role
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        self.rounding: Rounding | None = None
        self.border = border_of(layer)
        self.correction: Tensor | None = None  # added to the bias where weights are quantized
        self.factors: Tensor | None = None  # of the inputs, in front of their quantizer
        self.rotation = 0  # the group by which inputs are rotated behind their factors; 0: they are not
        self.branch: LowRank | None = None  # of the inputs as they come, added to the output
        self.first: Tensor | None = None  # what every first token becomes, in place of what is computed of it

    @property
    def weight(self) -> Tensor:
        """The float weight; some models read `layer.weight.dtype`."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias that is added and stored: that of the float layer, shifted where that was corrected."""
        bias: Tensor | None = getattr(self.layer, "bias", None)  # which tables of embeddings lack
        return bias if bias is None or self.correction is None else bias + self.correction.to(bias.dtype)

    def divide(self, factors: Tensor | None, branch: LowRank | None) -> None:
        """Keep a layer the same in float, with another weight: for channels times `factors`, without what `branch` does,
        which linears alone have."""
        if factors is None and branch is None:
            return
        assert getattr(self.layer, "groups", 1) == 1, "every output reads every channel"
        weight = self.weight.detach().float()
        weight = weight if branch is None else weight - branch.dense().to(weight.device)
        weight = weight if factors is None else weight / by_channel(factors, weight)
        self.layer = part_like(self.layer, weight.to(self.weight.dtype), bias=True)
        self.factors, self.branch = factors, branch

    def absorb(self, factors: Tensor) -> None:
        """Keep a linear the same in float where whoever makes its inputs multiplies them by `factors`."""
        weight = self.weight.detach().float() / factors
        self.layer = part_like(self.layer, weight.to(self.weight.dtype), bias=True)

    def multiply_outputs(self, factors: Tensor, added: Tensor) -> None:
        """Let a linear return as many times what it returned, and `added` to it."""
        assert self.layer.bias is not None, "a constant needs a bias"
        bias: Tensor = self.layer.bias.detach().float() * factors + added  # type: ignore[operator, union-attr]
        weight = self.weight.detach().float() * factors[:, None]
        part = part_like(self.layer, weight.to(self.weight.dtype), bias=True)
        part.bias = nn.Parameter(bias.to(self.layer.bias.dtype), requires_grad=False)  # type: ignore[arg-type, union-attr]
        self.layer = part

    def rotate(self, group: int) -> None:
        """Keep a linear the same in float, for inputs that are rotated; whatever divides it comes before."""
        if not group:
            return
        assert not self.rotation, "rotated twice"
        weight = rotate(self.weight.detach(), group)
        self.layer = part_like(self.layer, weight.to(self.weight.dtype), bias=True)
        self.rotation = group

    def received(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with."""
        x = x if self.factors is None else (x * by_channel(self.factors, self.weight)).to(x.dtype)
        x = rotate(x, self.rotation).to(x.dtype) if self.rotation else x
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def weight_values(self) -> Tensor:
        """The weight that this layer multiplies with, in float."""
        quantizer = self.weight_quantizer
        if quantizer is None or not quantizer.enabled:
            return self.weight
        if self.rounding is not None:
            return self.rounding.values(self.weight, quantizer)
        return quantizer.levels.values(to_groups(self.weight, quantizer.grid)).view_as(self.weight)

    def weight_integers(self) -> Tensor:
        """The integers that are packed, in the shape of the weight."""
        quantizer = self.weight_quantizer
        assert quantizer is not None, "a layer without a weight quantizer has no integers"
        if self.rounding is not None:
            return self.rounding.integers(self.weight, quantizer)
        return quantizer.levels.integers(to_groups(self.weight, quantizer.grid)).reshape(self.weight.shape)

    def __getattr__(self, name: str) -> Any:
        """What a model asks the layer itself: its widths, for one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, input: Tensor, *kept: Any, **__: object) -> Tensor:
        """`input` is what torch calls it, and some models name it."""
        if self.first is not None:
            return behind_first(self.first, self.computed(input[:, 1:]))
        return self.computed(input if self.border is None else bordered(input, self.border, *kept))

    def computed(self, x: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        bias = getattr(self.layer, "bias", None) if quantizer is None or not quantizer.enabled else self.bias
        y = apply_layer(self.layer, self.received(x), self.weight_values(), bias)  # type: ignore[arg-type]
        return y if self.branch is None else y + self.branch(x)


def by_channel(factors: Tensor, weight: Tensor) -> Tensor:
    """Over a weight (outputs, channels, ...), and over what is multiplied with it."""
    return factors.reshape(-1, *[1] * (weight.dim() - 2))


def from_integers(integers: Tensor, quantizer: Quantizer) -> Tensor:
    scale, zero_point = quantizer.range()
    rows = to_groups(integers, quantizer.grid)
    return dequantize(rows, scale[:, None], zero_point[:, None]).reshape(integers.shape)


def behind_first(first: Tensor, others: Tensor) -> Tensor:
    """(samples, tokens, outputs) of a text whose first token becomes `first` whatever it says."""
    return torch.cat([first.to(others).expand(len(others), 1, -1), others], 1)


def apply_layer(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` computes, with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor] = layer._conv_forward  # type: ignore[assignment]
    if not weight.requires_grad or not loses_gradients(x, layer.kernel_size, layer.dilation):  # type: ignore[arg-type]
        return convolve(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y = convolve(x.float(), weight.float(), None if bias is None else bias.float())
    return y.to(torch.bfloat16)
