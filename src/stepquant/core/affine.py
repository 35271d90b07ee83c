"""The affine map between numbers and integers: the only round and clamp of quantization in the package.

q = clamp(round(x * (1 / scale)) + zero_point, qmin, qmax),  x ~ (q - zero_point) * scale.
For activations as they come: scale = max |x| / qmax over each row of a linear's input or image of a convolution's, zero_point = 0.
For probabilities by powers of two: q = clamp(round(-log2(x / s)), qmin, qmax),  x ~ s 2^-q,  s = max x of each row.
Rounding is half to even and the reciprocal is taken once in float32, so that vector kernels reproduce it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepquant.core.grid import Grid, GridError


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Integers (in float storage) of `x`; `scale` and `zero_point` broadcast against it."""
    q = x.float() * scale.float().reciprocal()
    return q.round_().add_(zero_point).clamp_(grid.qmin, grid.qmax)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    centred = q - zero_point
    return centred.mul_(scale) if centred.dtype == scale.dtype else centred * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The number nearest to `x` that the grid can hold, in the dtype of `x`."""
    return quantize(x, scale, zero_point, grid).sub_(zero_point).mul_(scale).to(x.dtype)


def fake_quantize_log(x: Tensor, grid: Grid) -> Tensor:
    """The power of two of its row's greatest number that is nearest to each by its logarithm; nothing is negative."""
    most = x.float().amax(-1, keepdim=True)
    shares = x.float() / torch.where(most > 0, most, torch.ones_like(most))
    return (torch.exp2(shares.log2().round().clamp(-grid.qmax, -grid.qmin)) * most).to(x.dtype)


def fake_quantize_ste(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    chosen: Tensor | None = None,
    moved: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`fake_quantize` whose rounding passes gradients to `x` and to `scale` (straight-through).

    Elements that are not `chosen` stay what they are. Integers become those that they are `moved` to.
    """
    return StraightThrough.apply(x, scale, zero_point, grid, chosen, moved)  # type: ignore[no-any-return, no-untyped-call]


class StraightThrough(torch.autograd.Function):
    """One pass for the value and for both gradients, where recorded operations would take three times as long."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        grid: Grid,
        chosen: Tensor | None,
        moved: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        scaled = x.float() * scale.float().reciprocal()
        rounded = torch.round(scaled) + zero_point
        level = rounded.clamp(grid.qmin, grid.qmax)
        inside = level == rounded
        level = level if moved is None else moved(level)
        level -= zero_point
        out = (level * scale).to(x.dtype)
        # LSQ: d out / d scale is round(x/s) - x/s inside the range and the clipped integer outside.
        slope = level.sub_(scaled.mul_(inside))
        if chosen is not None:
            out, slope, inside = torch.where(chosen, out, x), slope.mul_(chosen), inside | ~chosen
        ctx.save_for_backward(inside, slope)
        ctx.shape = scale.shape
        return out

    @staticmethod
    def backward(ctx, slope_out: Tensor):  # type: ignore[no-untyped-def, override]
        inside, slope = ctx.saved_tensors
        of_x = slope_out * inside if ctx.needs_input_grad[0] else None
        of_scale = (slope_out.float() * slope).sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None
        return of_x, of_scale, None, None, None, None


def scale_and_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover [low, high]; zero is always representable exactly."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if grid.symmetric:
        scale = torch.maximum(-low, high) / grid.qmax
        zero_point = torch.zeros_like(scale)
    else:
        scale = (high - low) / (grid.qmax - grid.qmin)
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero_point = (grid.qmin - torch.round(low / safe)).clamp(grid.qmin, grid.qmax)
    # An all-zero tensor keeps scale 1: every integer but the zero point would be wrong anyway.
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale)), zero_point


def scales_of_rows(x: Tensor, first: int, qmax: int) -> Tensor:
    """A scale for everything that lies in the dimensions from `first` on, which are kept with size 1.

    Rows of zeros have scale 1. What is not finite stays seen: its scale is not finite either.
    """
    scale = x.float().abs().amax(tuple(range(first % x.dim(), x.dim())), keepdim=True) / qmax
    return torch.where(scale <= torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


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
