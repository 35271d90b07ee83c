"""Chains of a U-Net run as one: codes are made where the numbers are made, and only where an integer layer reads them.

Each class here takes the place of the `forward` of one block, on the instance; the block keeps its class, its
children and the names of its tensors. Whatever a chain cannot take goes the way of the block's own class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.models.blocks.resampling import Resampler
from stepquant.models.blocks.residual import ResidualUnit
from stepquant.models.blocks.up import UpBlock
from stepquant.models.split import SplitLayer
from stepquant.runtime import ops
from stepquant.runtime.layers import IntegerLayer
from stepquant.runtime.swallowed import Swallowed
from stepquant.runtime.times import TimeRows


class Chain(ABC):
    """What stands in for the forward of `module`; `swallowed` are modules inside whose own calls it leaves out."""

    joints: Sequence[Any] = ()  # groups of its layers that share one product
    goes_along = True  # its module runs as it would by itself

    def __init__(self, module: Any, *swallowed: Any) -> None:
        self.module, self.swallowed = module, Swallowed(*swallowed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.swallowed.awaited():
            return self.unfused(*args, **kwargs)
        with self.swallowed:
            return self.fused(*args, **kwargs)

    def unfused(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def state(self) -> list[Any]:
        """What the way it goes depends on besides its arguments; the very same things mean the same way."""
        return []

    @abstractmethod
    def fused(self, *args: Any, **kwargs: Any) -> Any: ...


def chains(model: nn.Module) -> list[Chain]:
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, Chain)]


class NormThen:
    """Group norm, activation and the layer that reads it; the norm writes codes if that layer takes them."""

    def __init__(self, norm: Any, activation: str, layer: Any) -> None:
        self.norm, self.activation, self.layer = norm, activation, layer

    def __call__(
        self, x: Tensor, add: Tensor | None = None, skip: Tensor | None = None, into: Tensor | None = None
    ) -> Tensor:
        return run(self.layer, self.normed(x, add, skip), x.dtype, into)

    def normed(self, x: Tensor, add: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """What the layer reads: codes, or floats if it computes in float."""
        kernel, norm = kernel_of(self.layer), self.norm
        norming = (x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        if kernel is None:
            return ops.group_norm(*norming, self.activation, add, None, None, skip)
        return ops.group_norm_quantize(*norming, kernel.code, self.activation, add, None, None, skip)


class Residual(Chain):
    """A residual block. `skip` is the half of its input that would have been concatenated."""

    def __init__(self, module: Any, unit: ResidualUnit, times: TimeRows | None, index: int) -> None:
        self.shortcut = module.conv_shortcut if unit.shortcut else None
        inside = (module.norm1, module.conv1, module.norm2, module.conv2, self.shortcut)
        super().__init__(module, *inside, module.nonlinearity, module.dropout)
        self.unit, self.times, self.index = unit, times, index
        self.first = NormThen(module.norm1, "silu", module.conv1)
        self.second = NormThen(module.norm2, "silu", module.conv2)

    def unfused(self, x: Tensor, *args: Any, skip: Tensor | None = None, **kwargs: Any) -> Any:
        return super().unfused(x if skip is None else torch.cat([x, skip], dim=1), *args, **kwargs)

    def fused(
        self, x: Tensor, temb: Tensor | None = None, *_: Any, skip: Tensor | None = None, **__: Any
    ) -> Tensor:
        hidden = self.first(x, None, skip)
        kept = addable(x, self.module.conv2) if self.shortcut is None else read_raw(self.shortcut, x, skip)
        out = self.second(hidden, self.time_row(temb, len(x)), None, kept)
        return out if self.unit.divisor == 1.0 else out / self.unit.divisor

    def time_row(self, temb: Tensor | None, batch: int) -> Tensor | None:
        if temb is None or not self.unit.timed:
            return None
        row = self.times.block(self.index, temb) if self.times is not None else None
        if row is None:
            return self.module.time_emb_proj(F.silu(temb))
        return row if batch == 1 else row.expand(batch, -1)


class Resample(Chain):
    """A down- or upsampling convolution; pixels are doubled and borders added on bytes, a quarter of the traffic."""

    def __init__(self, module: Any, unit: Resampler) -> None:
        super().__init__(module, *module.children())
        self.unit, self.conv = unit, module.conv

    def fused(self, x: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
        kernel = kernel_of(self.conv)
        if kernel is None:
            return self.unfused(x, output_size) if self.unit.doubles else self.unfused(x)
        codes = ops.quantize(x.contiguous(memory_format=torch.channels_last), kernel.code)
        if self.unit.doubles and output_size is not None:
            codes = F.interpolate(codes, size=output_size, mode="nearest")
        doubled = self.unit.doubles and output_size is None
        return self.conv.from_codes(codes, x.dtype, None, self.unit.border, doubled)


class Up(Chain):
    """An up block whose residual units take hidden and skip side by side, without a float concatenation."""

    def __init__(self, module: Any, unit: UpBlock) -> None:
        super().__init__(module)
        self.unit = unit
        self.residuals = list(module.resnets)
        self.attentions = list(getattr(module, "attentions", None) or [None] * len(self.residuals))
        self.upsamplers = list(module.upsamplers or ())

    def fused(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if args or any(getattr(self.module, name, None) for name in self.unit.unless):
            return self.unfused(hidden_states, res_hidden_states_tuple, temb, *args, **kwargs)
        x, size = hidden_states, kwargs.pop("upsample_size", None)
        for residual, attention, skip in zip(
            self.residuals, self.attentions, reversed(res_hidden_states_tuple)
        ):
            if isinstance(residual.forward, Residual):
                x = residual(x, temb, skip=skip)
            else:
                x = residual(torch.cat([x, skip], dim=1), temb)
            if self.unit.textual:
                x = attention(x, **kwargs, return_dict=False)[0]
            elif attention is not None:
                x = attention(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, size) if self.unit.sized else upsampler(x)
        return x

    def state(self) -> list[Any]:
        attributes = self.module.__dict__
        return [attributes.get(name) for name in self.unit.unless]


class NormOut(Chain):
    """The last norm and activation, in one; writes the codes that the head reads."""

    def __init__(self, module: Any, activation: Any, head: Any) -> None:
        super().__init__(module, module, activation, head)
        self.head = head

    def fused(self, x: Tensor) -> Tensor:
        norm, kernel = self.module, kernel_of(self.head)
        if kernel is None:
            return ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, "silu")
        return ops.group_norm_quantize(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, kernel.code, "silu"
        )


class Done(Chain):
    """An activation that the operation before it has already applied."""

    def __init__(self, module: Any, before: NormOut) -> None:
        super().__init__(module)
        self.swallowed = before.swallowed  # both go the same way

    def fused(self, x: Tensor) -> Tensor:
        return x


def kernel_of(layer: Any) -> Any:
    """The integer kernel of a layer, or None if it computes in float."""
    return layer.prepared().kernel if isinstance(layer, IntegerLayer) else None


def codes_for(layer: Any, x: Tensor) -> Tensor:
    """`x` as `layer` reads it: codes, or as it is."""
    kernel = kernel_of(layer)
    return x if kernel is None else ops.quantize(x, kernel.code)


def run(layer: Any, x: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """`layer` on codes, put out in `dtype`, or on floats; added to `into`, which may be consumed."""
    if x.dtype == torch.uint8:
        return layer.from_codes(x, dtype, into)  # type: ignore[no-any-return]
    y = layer(x)
    return y if into is None else y + into  # type: ignore[no-any-return]


def read_raw(layer: Any, x: Tensor, skip: Tensor | None) -> Tensor:
    """`layer` on concat(x, skip), quantized without concatenating floats, in memory that may be written to."""
    if skip is None:
        return layer(x)
    kernel = kernel_of(layer)
    if kernel is not None:
        return layer.from_codes(ops.quantize_concat(x, skip, kernel.code), x.dtype)
    if isinstance(layer, SplitLayer) and layer.widths == (x.shape[1], skip.shape[1]):
        first, second = layer.children()
        return run(second, codes_for(second, skip), x.dtype, first(x))
    return layer(torch.cat([x, skip], dim=1))


def addable(x: Tensor, layer: Any) -> Tensor:
    """`x`, or a copy of it where `layer` may write into what it adds."""
    kernel = kernel_of(layer)
    return x.clone() if kernel is not None and kernel.product is None else x


def pixels(x: Tensor) -> Tensor:
    """(batch * height * width, channels) of an image."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
