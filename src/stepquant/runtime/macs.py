"""Multiply-accumulates: one definition for each operation that sums products, by which everything here counts.

They are those of the textbook: an operation that gets by with fewer (patches of 3x3 convolutions) counts the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.runtime.cpu.products import ConvKernel, LinearKernel
from stepquant.runtime.device import operations

ATTENTION = ("stepquant::attention", "stepquant::attention_by_row")
INTEGER_OPS = operations()


def multiply_accumulates(name: str, args: Sequence[Any], out: Any) -> int:
    """Of one call of the operation `name` (`aten::mm`); those that sum no products have none."""
    count = COUNTS.get(name)
    return 0 if count is None else int(count(args, out))


class Work(TorchDispatchMode):
    """Multiply-accumulates of what runs while it is entered, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        self.macs[name] += multiply_accumulates(name, args, out)
        return out


Count = Callable[[Sequence[Any], Any], int]


def rows_of(place: int) -> Count:
    """A product of matrices, the left one at `place`: every output sums one of its rows."""
    return lambda args, out: out.numel() * args[place].shape[-1]


def convolution(args: Sequence[Any], out: Tensor) -> int:
    """Of floats; a transposed one spreads each input, where others gather each output."""
    x, weight, transposed = args[0], args[1], args[6]
    return (x if transposed else out).numel() * weight.shape[1:].numel()


def packed(args: Sequence[Any], out: Tensor) -> int:
    """A weight in another library's order, which tells its size, and a scale for each output channel."""
    weight, scales = args[3], args[4]
    return out.numel() * (weight.numel() // scales.numel())


def window(args: Sequence[Any], out: Tensor) -> int:
    codes, (height, width) = args[0], args[7]
    return out.numel() * codes.shape[1] * height * width  # type: ignore[no-any-return]


def linear(args: Sequence[Any], out: Tensor) -> int:
    """With the product of a branch's side, where there is one."""
    low = args[11] if len(args) > 11 else None
    return out.numel() * (args[0].shape[-1] + (0 if low is None else low.shape[-1]))  # type: ignore[no-any-return]


def side(args: Sequence[Any], _: Tensor) -> int:
    x, _, outs = args
    return x.numel() * outs  # type: ignore[no-any-return]


def attention(args: Sequence[Any], _: Any) -> int:
    """Both products: query with key, and probabilities with value."""
    query, key, value = args[:3]
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])  # type: ignore[no-any-return]


COUNTS: Mapping[str, Count] = {
    "aten::mm": rows_of(0),
    "aten::addmm": rows_of(1),
    "aten::_int_mm": rows_of(0),
    "aten::bmm": rows_of(0),
    "aten::baddbmm": rows_of(1),
    "aten::convolution": convolution,
    "aten::_scaled_dot_product_flash_attention_for_cpu": attention,
    "aten::_scaled_dot_product_flash_attention": attention,
    "aten::_scaled_dot_product_efficient_attention": attention,
    "aten::_scaled_dot_product_cudnn_attention": attention,
    ConvKernel.name: packed,
    ConvKernel.own_name: window,
    LinearKernel.name: packed,
    LinearKernel.own_name: linear,
    "stepquant::multiply_side": side,
    "stepquant::stored_linear": rows_of(0),
    **dict.fromkeys(ATTENTION, attention),
}
