"""What every operation of `runtime.ops` computes, in plain torch: the specification and the fallback.

Arithmetic is in float32, rounding is half to even, integers are sums without error. Statistics of a norm are taken in
float64, so that a kernel may sum in any order and still agree to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.core.grid import Grid


class Code(NamedTuple):
    """Where a number lands in a byte: clamp(round(x * (1 / scale)) + zero_point, low, high), always unsigned.

    The integer q of a signed grid is stored as q + 128; its zero point and limits shift along.
    """

    scale: float
    zero_point: int = 128
    low: int = 0
    high: int = 255

    @classmethod
    def of_grid(cls, grid: Grid, scale: float, zero_point: int = 0) -> Code:
        offset = 128 if grid.signed else 0
        return cls(float(scale), int(zero_point) + offset, grid.qmin + offset, grid.qmax + offset)


def quantize(x: Tensor, code: Code) -> Tensor:
    inverse = torch.tensor(code.scale, dtype=torch.float32, device=x.device).reciprocal()
    q = torch.round(x.float() * inverse) + code.zero_point
    return q.clamp(code.low, code.high).to(torch.uint8)


def quantize_concat(x: Tensor, skip: Tensor, code: Code) -> Tensor:
    return channels_last(quantize(torch.cat([x, skip], dim=1), code))


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
    return channels_last(
        _group_norm(x, weight, bias, groups, eps, activation, add, scale, shift, skip).to(x.dtype)
    )


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
    y = _group_norm(x, weight, bias, groups, eps, activation, add, scale, shift, skip)
    return channels_last(quantize(y, code))


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    code: Code,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    y = _standardize(x, eps)
    y = _affine(y, weight, bias, (1,) * (x.dim() - 1) + (-1,))
    rows = (-1,) + (1,) * (x.dim() - 2) + (x.shape[-1],)
    return quantize(_modulate(y, scale, shift, rows), code).contiguous()


def activation_quantize(x: Tensor, activation: str, code: Code) -> Tensor:
    return quantize(activate(x.float(), activation), code)


def upsample_nearest2x(x: Tensor) -> Tensor:
    return channels_last(x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    query_code: Code,
    key_code: Code,
    value_code: Code,
    probabilities_code: Code,
) -> Tensor:
    """softmax(query key^T * scale) value, both products in integers, the probabilities quantized in between."""
    q = quantize(query, query_code).double() - query_code.zero_point
    k = quantize(key, key_code).double() - key_code.zero_point
    v = quantize(value, value_code).double() - value_code.zero_point
    scores = q @ k.transpose(-1, -2)
    # The distance to the row's maximum is taken on integers, where it is exact.
    distance = (scores - scores.amax(-1, keepdim=True)).float()
    factor = _single(query_code.scale) * _single(key_code.scale) * _single(scale)
    p = quantize(torch.softmax(distance * factor, dim=-1), probabilities_code).double()
    products = (p - probabilities_code.zero_point) @ v
    result = products.float() * (_single(probabilities_code.scale) * _single(value_code.scale))
    return result.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def convolve(
    codes: Tensor,
    code_scale: float,
    zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    add: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    sides: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    doubled: bool = False,
) -> Tensor:
    """A convolution of codes with signed bytes (out, in, height, width); `sides` are left, right, top and bottom."""
    x = codes.double() - zero_point
    x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2) if doubled else x
    sums = F.conv2d(F.pad(x, list(sides)), weight.double(), None, tuple(stride), 0, tuple(dilation))
    shape = (1, -1, 1, 1)
    y = sums.float() * (weight_scale.float() * _single(code_scale)).reshape(shape)
    y = y if bias is None else y + bias.float().reshape(shape)
    y = y if add is None else y + add.to(dtype).float()
    return channels_last(y.to(dtype))


def linear(
    codes: Tensor,
    code_scale: float,
    zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    add: Tensor | None = None,
) -> Tensor:
    sums = (codes.double() - zero_point) @ weight.double().T
    y = sums.float() * (weight_scale.float() * _single(code_scale))
    y = y if bias is None else y + bias.float()
    return (y if add is None else y + add.to(dtype).float()).to(dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation by name; the gated ones halve the last dimension (first half values, second half gates)."""
    if activation in ("geglu", "swiglu"):
        values, gates = x.chunk(2, dim=-1)
        return values * (F.gelu(gates) if activation == "geglu" else F.silu(gates))
    return ACTIVATIONS[activation](x)


ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channels (dimension 1) densest in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _group_norm(
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
    x = x.float()
    if skip is not None:
        x = torch.cat([x, skip.float()], dim=1)
    rows = (-1, x.shape[1]) + (1,) * (x.dim() - 2)
    if add is not None:
        x = x + add.float().reshape(rows)
    width = x.shape[1:].numel() // groups
    y = _standardize(x.reshape(x.shape[0], groups, width), eps).reshape(x.shape)
    y = _affine(y, weight, bias, (1, -1) + (1,) * (x.dim() - 2))
    return activate(_modulate(y, scale, shift, rows), activation)


def _standardize(x: Tensor, eps: float) -> Tensor:
    if x.numel() == 0:
        return x.float()
    variance, mean = torch.var_mean(x.double(), dim=-1, correction=0, keepdim=True)
    return ((x.double() - mean) * torch.rsqrt(variance + eps)).float()


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    y = y if weight is None else y * weight.float().reshape(shape)
    return y if bias is None else y + bias.float().reshape(shape)


def _modulate(y: Tensor, scale: Tensor | None, shift: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    y = y if scale is None else y * (1 + scale.float().reshape(shape))
    return y if shift is None else y + shift.float().reshape(shape)


def _single(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float32)
