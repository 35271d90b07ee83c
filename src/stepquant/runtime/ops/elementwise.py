"""Quantizing numbers to codes, alone, behind an activation or by the row, and nearest upsampling of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.core.affine import scales_of_rows
from stepquant.core.rotation import rotate
from stepquant.runtime.ops.code import Code, channels_last, codes
from stepquant.runtime.ops.operation import Operation


@Operation
def quantize(x: Tensor, code: Code, factors: Tensor | None = None) -> Tensor:
    """The codes of `x`, in its shape and memory format; first, `factors` multiply along the last dimension."""
    numbers = x if factors is None else x.float() * factors.float()
    return torch.empty_like(x, dtype=torch.uint8).copy_(codes(numbers, code))


@Operation
def move_codes(codes: Tensor, table: Tensor) -> Tensor:
    """What a table of 256 bytes has at the place of each code, in the shape and memory format of the codes."""
    moved = table.index_select(0, codes.flatten().int()).view(codes.shape)
    return torch.empty_like(codes).copy_(moved)


@Operation
def quantize_concat(x: Tensor, skip: Tensor, code: Code) -> Tensor:
    """The codes of `x` and `skip` side by side along the channels, without their float concatenation."""
    return channels_last(codes(torch.cat([x, skip], dim=1), code))


@Operation
def activation_quantize(x: Tensor, activation: str, code: Code) -> Tensor:
    """The codes of an activation: 'silu', 'gelu', 'gelu_tanh', or a gated one, which halves the last dimension."""
    y = codes(activate(x.float(), activation), code)
    return y.contiguous() if activation in GATED else torch.empty_like(x, dtype=torch.uint8).copy_(y)


@Operation
def row_scales(x: Tensor, first: int, qmax: int) -> Tensor:
    """Of what lies in the dimensions from `first` on: the greatest magnitude becomes `qmax`, zeros have scale 1."""
    return scales_of_rows(x, first, qmax)


@Operation
def quantize_rows(x: Tensor, scales: Tensor, code: Code) -> Tensor:
    """The codes of `x` over its rows' scales, in its shape and memory format; the scale of `code` is not read."""
    q = torch.round(x.float() * scales.reciprocal()) + code.zero_point
    return torch.empty_like(x, dtype=torch.uint8).copy_(q.clamp(code.low, code.high))


@Operation
def rotate_quantize_rows(
    x: Tensor, group: int, code: Code, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The codes of rows that `factors` multiply, and that are then rotated by the group, if it is more than one number; and
    their scales as `row_scales` finds them. That of `code` is not read."""
    turned = rotate(x if factors is None else x.float() * factors.float(), group).contiguous()
    scales = scales_of_rows(turned, -1, code.high - code.zero_point)
    q = torch.round(turned * scales.reciprocal()) + code.zero_point
    return q.clamp(code.low, code.high).to(torch.uint8), scales


@Operation
def scale_rows(
    sums: Tensor, scales: Tensor, bias: Tensor | None, channels: int, dtype: torch.dtype
) -> Tensor:
    """Float32 products of such codes times their rows' scales, plus bias along `channels`, with one rounding to `dtype`."""
    y = sums * scales
    if bias is not None:
        y = y + bias.float().reshape([-1 if place == channels % y.dim() else 1 for place in range(y.dim())])
    return torch.empty_like(sums, dtype=dtype).copy_(y)


@Operation
def upsample_nearest2x(x: Tensor) -> Tensor:
    """Bytes (batch, channels, height, width) with every pixel twice in both directions, channels densest."""
    return channels_last(x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2))


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation by name; the gated ones halve the last dimension (values, then gates, but in 'swiglu_first')."""
    if activation in GATED:
        values, gates = x.chunk(2, dim=-1)
        values, gates = (gates, values) if activation == "swiglu_first" else (values, gates)
        return values * GATED[activation](gates)
    return ACTIVATIONS[activation](x)


GATED: dict[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "swiglu": F.silu, "swiglu_first": F.silu}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
