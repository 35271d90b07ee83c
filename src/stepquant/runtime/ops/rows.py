"""Codes by the row: every row of a linear's input, or image of a convolution's, with the scale that its own numbers need."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.core.affine import scales_of_rows
from stepquant.runtime.ops.code import Code
from stepquant.runtime.ops.operation import Operation


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
def scale_rows(sums: Tensor, scales: Tensor, bias: Tensor | None, channels: int, dtype: torch.dtype) -> Tensor:
    """Float32 products of such codes times their rows' scales, plus bias along `channels`, with one rounding to `dtype`."""
    y = sums * scales
    if bias is not None:
        y = y + bias.float().reshape([-1 if place == channels % y.dim() else 1 for place in range(y.dim())])
    return torch.empty_like(sums, dtype=dtype).copy_(y)
