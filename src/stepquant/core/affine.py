"""The affine map between numbers and integers: the only round and clamp of quantization in the package.

q = clamp(round(x * (1 / scale)) + zero_point, qmin, qmax),  x ~ (q - zero_point) * scale.
Rounding is half to even and the reciprocal is taken once in float32, so that vector kernels reproduce it bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.core.grid import Grid, GridError


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Integers (in float storage) of `x`; `scale` and `zero_point` broadcast against it."""
    q = torch.round(x.float() * scale.float().reciprocal()) + zero_point
    return q.clamp(grid.qmin, grid.qmax)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (q - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The number nearest to `x` that the grid can hold, in the dtype of `x`."""
    return dequantize(quantize(x, scale, zero_point, grid), scale, zero_point).to(x.dtype)


def fake_quantize_ste(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """`fake_quantize` whose rounding passes gradients to `x` and to `scale` (straight-through)."""
    scaled = x * scale.reciprocal()
    q = scaled + (torch.round(scaled) - scaled).detach() + zero_point
    return (q.clamp(grid.qmin, grid.qmax) - zero_point) * scale


def scale_and_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover [low, high]; zero is always representable exactly."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if grid.symmetric:
        scale = torch.maximum(-low, high) / grid.qmax
        zero_point = torch.zeros_like(scale)
    else:
        scale = (high - low) / grid.steps
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero_point = (grid.qmin - torch.round(low / safe)).clamp(grid.qmin, grid.qmax)
    # An all-zero tensor keeps scale 1: every integer but the zero point would be wrong anyway.
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale)), zero_point


def to_groups(weight: Tensor, grid: Grid) -> Tensor:
    """View `weight` (out, ...) as (scales, elements): one row per scale of the grid."""
    if grid.granularity == "tensor":
        return weight.reshape(1, -1)
    if grid.granularity == "channel":
        return weight.reshape(weight.shape[0], -1)
    if grid.granularity == "group":
        width = weight[0].numel()
        if width % grid.group:
            raise GridError(f"groups of {grid.group} do not divide the {width} inputs of the layer")
        return weight.reshape(-1, grid.group)
    raise GridError(f"weights have no tokens, and cannot be on {grid}")
