"""Shapes and memory formats of what the compiled operations return, for torch.compile and torch.export."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from stepquant.errors import RuntimeSupportError


def register() -> None:
    """Tell torch about every operation; they must be loaded."""
    functions: tuple[Callable[..., Tensor], ...] = (
        quantize,
        quantize_concat,
        group_norm,
        group_norm_quantize,
        layer_norm_quantize,
        activation_quantize,
        upsample_nearest2x,
        attention,
        pack_weight,
        convolve,
        linear,
    )
    for function in functions:
        torch.library.register_fake(f"stepquant::{function.__name__}", without_numbers(function))


def without_numbers(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` for tensors without numbers only: one on the meta device among others would make up the result."""
    name = function.__name__
    parameters = [p.name for p in getattr(torch.ops.stepquant, name).default._schema.arguments]

    @functools.wraps(function)
    def fake(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(parameters, args)) | kwargs
        real = [place for place, value in given.items() if has_numbers(value)]
        absent = [place for place, value in given.items() if isinstance(value, Tensor) and value.is_meta]
        if real and absent:
            raise RuntimeSupportError(
                f"operation '{name}' cannot compute: argument '{absent[0]}' is on the meta device, where it has no numbers",
                got=f"{', '.join(absent)} on meta, {', '.join(real)} with numbers",
                expected="all tensors on the cpu",
                fix="load what was offloaded before the call: accelerate.hooks.remove_hook_from_submodules(model)",
            )
        return function(*args, **kwargs)

    return fake


def has_numbers(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and not isinstance(value, FakeTensor)


def quantize(x: Tensor, *code: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def quantize_concat(x: Tensor, skip: Tensor, *code: float) -> Tensor:
    return _channels_last(x, x.shape[1] + skip.shape[1], torch.uint8)


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
    return _channels_last(x, x.shape[1] + (skip.shape[1] if skip is not None else 0), x.dtype)


def group_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    code_scale: float,
    zero_point: int,
    low: int,
    high: int,
    activation: str = "none",
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    return _channels_last(x, x.shape[1] + (skip.shape[1] if skip is not None else 0), torch.uint8)


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    code_scale: float,
    zero_point: int,
    low: int,
    high: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def activation_quantize(x: Tensor, activation: str, *code: float) -> Tensor:
    if activation in ("geglu", "swiglu"):
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return torch.empty_like(x, dtype=torch.uint8)


def upsample_nearest2x(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, 2 * height, 2 * width, channels)).permute(0, 3, 1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, *codes: float) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def pack_weight(weight: Tensor) -> Tensor:
    outputs, inputs = ((size + unit - 1) // unit * unit for size, unit in zip(weight.shape, (16, 4)))
    return weight.new_empty(outputs * inputs * weight[0, 0].numel())


def convolve(
    codes: Tensor,
    code_scale: float,
    zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    sides: Sequence[int],
    dilation: Sequence[int],
    doubled: bool,
    dtype: torch.dtype,
    add: Tensor | None = None,
) -> Tensor:
    times = 2 if doubled else 1
    high, wide = (
        (times * size + first + last - step * (reach - 1) - 1) // pace + 1
        for size, first, last, step, reach, pace in zip(
            codes.shape[2:], sides[2::-2], sides[3::-2], dilation, kernel, stride
        )
    )
    out = codes.new_empty((codes.shape[0], high, wide, weight_scale.shape[0]), dtype=dtype)
    return out.permute(0, 3, 1, 2)


def linear(
    codes: Tensor,
    code_scale: float,
    zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    add: Tensor | None = None,
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight_scale.shape[0]), dtype=dtype)


def _channels_last(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], channels), dtype=dtype).movedim(-1, 1)
