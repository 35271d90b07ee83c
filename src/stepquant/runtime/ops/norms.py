"""Group, layer and RMS norm fused with what stands around them; they return numbers or codes.

Statistics are taken in float64, so that a kernel may sum in any order and still agree to float32 rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.runtime.ops.code import Code, channels_last, codes, exact
from stepquant.runtime.ops.elementwise import activate
from stepquant.runtime.ops.operation import Operation


@Operation
def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str = "none",
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """activation(norm(concat(x, skip) + add) * (1 + scale) + shift) in the dtype of `x`, channels densest.

    `x` is (batch, channels, ...); `add`, `scale` and `shift` are (batch, channels); activation is 'none' or 'silu'.
    """
    y = normed(x, weight, bias, groups, eps, activation, add, scale, shift, skip)
    return channels_last(y.to(x.dtype))


@Operation
def group_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    code: Code,
    activation: str = "none",
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The codes of what `group_norm` would return."""
    y = normed(x, weight, bias, groups, eps, activation, add, scale, shift, skip)
    return channels_last(codes(y, code))


@Operation
def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    code: Code,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The codes of norm(x) * (1 + scale) + shift over the last dimension; `scale` and `shift` are (batch, width)."""
    y = affine(standardized(x, eps), weight, bias, (1,) * (x.dim() - 1) + (-1,))
    rows = (-1,) + (1,) * (x.dim() - 2) + (x.shape[-1],)
    return codes(modulated(y, scale, shift, rows), code).contiguous()


@Operation
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    gate: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `weight`, times `gate` (batch, width), plus `add`."""
    y = affine(root_normed(x, eps), weight, None, (1,) * (x.dim() - 1) + (-1,))
    y = y if gate is None else y * gate.float().reshape((-1,) + (1,) * (x.dim() - 2) + (x.shape[-1],))
    return (y if add is None else y + add.to(dtype).float()).to(dtype).contiguous()


@Operation
def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    code: Code,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The codes of rms_norm(x) * (1 + scale) + shift."""
    y = affine(root_normed(x, eps), weight, None, (1,) * (x.dim() - 1) + (-1,))
    rows = (-1,) + (1,) * (x.dim() - 2) + (x.shape[-1],)
    return codes(modulated(y, scale, shift, rows), code).contiguous()


@Operation
def rms_norm_rotary_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    across: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    halves: bool,
    code: Code,
) -> Tensor:
    """The codes of queries or keys (batch, tokens, heads, width): the RMS norm of each head, or `across` all of a token,
    times `weight`; then every pair of channels turned by an angle, (batch or 1, tokens, width / 2).

    The channels of a pair are neighbours, or lie half a head apart where `halves`.
    """
    rows = x.flatten(2) if across else x
    y = affine(root_normed(rows, eps), weight, None, (1,) * (rows.dim() - 1) + (-1,)).reshape(x.shape)
    return codes(y if cos is None or sin is None else turned(y, cos, sin, halves), code).contiguous()


@Operation
def layer_norm_rotary_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    halves: bool,
    code: Code,
) -> Tensor:
    """The same behind the layer norm of each head."""
    y = affine(standardized(x, eps), weight, bias, (1, 1, 1, -1))
    return codes(y if cos is None or sin is None else turned(y, cos, sin, halves), code).contiguous()


def turned(y: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    cos, sin = (angles.float()[:, :, None] for angles in (cos, sin))
    first, second = y.chunk(2, -1) if halves else (y[..., ::2], y[..., 1::2])
    pair = first * cos - second * sin, second * cos + first * sin
    return torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)


def normed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
) -> Tensor:
    x = x.float() if skip is None else torch.cat([x.float(), skip.float()], dim=1)
    rows = (-1, x.shape[1]) + (1,) * (x.dim() - 2)
    if add is not None:
        x = x + add.float().reshape(rows)
    width = x.shape[1:].numel() // groups
    y = standardized(x.reshape(x.shape[0], groups, width), eps).reshape(x.shape)
    y = affine(y, weight, bias, (1, -1) + (1,) * (x.dim() - 2))
    return activate(modulated(y, scale, shift, rows), activation)


def standardized(x: Tensor, eps: float) -> Tensor:
    if x.numel() == 0:
        return x.float()
    x = exact(x)
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return ((x - mean) * torch.rsqrt(variance + eps)).float()


def root_normed(x: Tensor, eps: float) -> Tensor:
    y = exact(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).float()


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    y = y if weight is None else y * weight.float().reshape(shape)
    return y if bias is None else y + bias.float().reshape(shape)


def modulated(y: Tensor, scale: Tensor | None, shift: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    y = y if scale is None else y * (1 + scale.float().reshape(shape))
    return y if shift is None else y + shift.float().reshape(shape)
