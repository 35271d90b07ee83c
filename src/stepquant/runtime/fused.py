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
from torch import Tensor

from stepquant.models.split import SplitLayer
from stepquant.models.structure import AttentionUnit, Resampler, ResidualUnit, UpBlock
from stepquant.runtime import ops
from stepquant.runtime.cpu import LinearKernel, joined
from stepquant.runtime.layers import IntegerLayer
from stepquant.runtime.times import TimeRows


class Chain(ABC):
    """What stands in for the forward of `module`."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def unfused(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def state(self) -> list[Any]:
        """What the way it goes depends on besides its arguments; the very same things mean the same way."""
        return []

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class NormThen:
    """Group norm, activation and the layer that reads it; the norm writes codes if that layer takes them."""

    def __init__(self, norm: Any, activation: str, layer: Any) -> None:
        self.weight, self.bias, self.groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps
        self.activation, self.layer = activation, layer

    def __call__(
        self, x: Tensor, add: Tensor | None = None, skip: Tensor | None = None, into: Tensor | None = None
    ) -> Tensor:
        kernel = kernel_of(self.layer)
        if kernel is None:
            y = ops.group_norm(
                x, self.weight, self.bias, self.groups, self.eps, self.activation, add, None, None, skip
            )
            y = self.layer(y)
            return y if into is None else y + into
        codes = ops.group_norm_quantize(
            x,
            self.weight,
            self.bias,
            self.groups,
            self.eps,
            kernel.code,
            self.activation,
            add,
            None,
            None,
            skip,
        )
        return self.layer.from_codes(codes, x.dtype, into)


class Residual(Chain):
    """A residual block. `skip` is the half of its input that would have been concatenated."""

    def __init__(self, module: Any, unit: ResidualUnit, times: TimeRows | None, index: int) -> None:
        super().__init__(module)
        self.unit, self.times, self.index = unit, times, index
        self.first = NormThen(module.norm1, "silu", module.conv1)
        self.second = NormThen(module.norm2, "silu", module.conv2)
        self.shortcut = module.conv_shortcut if unit.shortcut else None

    def __call__(
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


class Attention(Chain):
    """Self-attention over the pixels of an image; q, k and v read one tensor, quantized once if they agree on how."""

    def __init__(self, module: Any, unit: AttentionUnit) -> None:
        super().__init__(module)
        self.unit = unit
        self.readers = (module.to_q, module.to_k, module.to_v)
        self.widths = [layer.out_features for layer in self.readers]
        self.joins = True
        self.joint: tuple[tuple[LinearKernel, ...], LinearKernel] | None = None
        self.norm = module.group_norm
        self.out = module.to_out[0]
        self.product = getattr(module, "product", None)
        self.processor = module.processor

    def __call__(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        changed = self.module.processor is not self.processor
        if changed or encoder_hidden_states is not None or attention_mask is not None or x.dim() != 4:
            return self.unfused(x, encoder_hidden_states, attention_mask, **kwargs)
        batch, channels, height, width = x.shape
        q, k, v = (
            y.view(batch, height * width, self.unit.heads, -1).transpose(1, 2) for y in self.project(x)
        )
        mixed = self.product(q, k, v) if self.product is not None else F.scaled_dot_product_attention(q, k, v)
        rows = mixed.transpose(1, 2).reshape(batch * height * width, -1)
        out = self.finish(rows, x.permute(0, 2, 3, 1).reshape(rows.shape[0], channels))
        out = out.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return out if self.unit.divisor == 1.0 else out / self.unit.divisor

    def state(self) -> list[Any]:
        return [self.module.processor, self.joins]

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Query, key and value, each (pixels, width)."""
        norm, kernels = self.norm, tuple(kernel_of(layer) for layer in self.readers)
        if kernels[0] is None or any(kernel is None or kernel.code != kernels[0].code for kernel in kernels):
            y = x if norm is None else ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
            return [layer(pixels(y)) for layer in self.readers]
        code = kernels[0].code
        if norm is None:
            codes = ops.quantize(x, code)
        else:
            codes = ops.group_norm_quantize(x, norm.weight, norm.bias, norm.num_groups, norm.eps, code)
        if not self.joins:
            return [layer.from_codes(pixels(codes), x.dtype) for layer in self.readers]
        return self.joint_kernel(kernels)(pixels(codes), x.dtype).split(self.widths, 1)

    def joint_kernel(self, kernels: tuple[LinearKernel, ...]) -> LinearKernel:
        """One product of all three widths, made again when a layer has made its own kernel again."""
        code = kernels[0].code
        if self.joint is None or any(a.packed is not b.packed for a, b in zip(self.joint[0], kernels)):
            self.joint = (kernels, joined(kernels))
        if self.joint[1].code != code:
            self.joint = (kernels, self.joint[1].with_code(code))
        return self.joint[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"joint": None}

    def finish(self, rows: Tensor, residual: Tensor) -> Tensor:
        kernel = kernel_of(self.out)
        if kernel is None:
            out = self.out(rows)
            return out + residual if self.unit.residual else out
        codes = ops.quantize(rows, kernel.code)
        return self.out.from_codes(codes, rows.dtype, residual if self.unit.residual else None)


class Resample(Chain):
    """A down- or upsampling convolution; pixels are doubled and borders added on bytes, a quarter of the traffic."""

    def __init__(self, module: Any, unit: Resampler) -> None:
        super().__init__(module)
        self.unit, self.conv = unit, module.conv

    def __call__(self, x: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
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

    def __call__(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        temb: Tensor | None = None,
        upsample_size: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if any(getattr(self.module, name, None) for name in self.unit.unless):
            return self.unfused(hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs)
        x = hidden_states
        for residual, attention, skip in zip(
            self.residuals, self.attentions, reversed(res_hidden_states_tuple)
        ):
            if isinstance(residual.forward, Residual):
                x = residual(x, temb, skip=skip)
            else:
                x = residual(torch.cat([x, skip], dim=1), temb)
            x = x if attention is None else attention(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, upsample_size) if self.unit.sized else upsampler(x)
        return x

    def state(self) -> list[Any]:
        attributes = self.module.__dict__
        return [attributes.get(name) for name in self.unit.unless]


class NormOut(Chain):
    """The last norm and activation, in one; writes the codes that the head reads."""

    def __init__(self, module: Any, head: Any) -> None:
        super().__init__(module)
        self.head = head

    def __call__(self, x: Tensor) -> Tensor:
        norm, kernel = self.module, kernel_of(self.head)
        if kernel is None:
            return ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, "silu")
        return ops.group_norm_quantize(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, kernel.code, "silu"
        )


class Done(Chain):
    """An activation that the operation before it has already applied."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


def kernel_of(layer: Any) -> Any:
    """The integer kernel of a layer, or None if it computes in float."""
    return (layer.kernel or layer.prepared().kernel) if isinstance(layer, IntegerLayer) else None


def read_raw(layer: Any, x: Tensor, skip: Tensor | None) -> Tensor:
    """`layer` on concat(x, skip), quantized without concatenating floats, in memory that may be written to."""
    if skip is None:
        return layer(x)
    kernel = kernel_of(layer)
    if kernel is not None:
        return layer.from_codes(ops.quantize_concat(x, skip, kernel.code), x.dtype)
    if isinstance(layer, SplitLayer) and layer.widths == (x.shape[1], skip.shape[1]):
        first, second = layer.children()
        return add_layer(second, skip, first(x))
    return layer(torch.cat([x, skip], dim=1))


def add_layer(layer: Any, x: Tensor, into: Tensor) -> Tensor:
    kernel = kernel_of(layer)
    return (
        layer(x) + into if kernel is None else layer.from_codes(ops.quantize(x, kernel.code), x.dtype, into)
    )


def addable(x: Tensor, layer: Any) -> Tensor:
    """`x`, or a copy of it where `layer` may write into what it adds."""
    kernel = kernel_of(layer)
    return x.clone() if kernel is not None and kernel.product is None else x


def pixels(x: Tensor) -> Tensor:
    """(batch * height * width, channels) of an image."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
