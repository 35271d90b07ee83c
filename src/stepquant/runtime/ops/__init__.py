"""The operations between integer layers: compiled kernels where the extension was built, plain torch elsewhere.

All take bfloat16 or float32 of any strides and write unsigned bytes (or the input's dtype) with the channels densest;
`reference` states what each computes. Small tensors (weights, biases, modulations) may have either dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.runtime.ops import fakes, reference
from stepquant.runtime.ops.reference import Code

__all__ = [
    "Code",
    "Product",
    "activation_quantize",
    "attention",
    "compiled",
    "convolve",
    "group_norm",
    "group_norm_quantize",
    "layer_norm_quantize",
    "linear",
    "quantize",
    "quantize_concat",
    "upsample_nearest2x",
    "why_plain",
]


def _load() -> str | None:
    """Why there are no kernels; None where there are."""
    try:
        importlib.import_module("stepquant._C")
    except ModuleNotFoundError:
        return "the C++ kernels are not built (no compiler at install?)"
    except ImportError as error:
        return (
            f"the C++ kernels were built for another torch than {torch.__version__} "
            f"({' '.join(str(error).split())[:200]}): in stepquant's source, rebuild them with "
            "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir ."
        )
    fakes.register()
    return None


_WHY_PLAIN = _load()
_COMPILED = _WHY_PLAIN is None
# Asked once, because torch.compile follows what returns a tensor and no text.
_CAPABILITY: str = torch.ops.stepquant.capability() if _COMPILED else "none"


def compiled() -> bool:
    """Whether the C++ kernels are there; without them every operation runs as several torch calls."""
    return _COMPILED


def why_plain() -> str | None:
    """What is the matter with the C++ kernels, and what to do about it; None where they are there."""
    return _WHY_PLAIN


def capability() -> str:
    """The instruction set the kernels were dispatched to: amx, avx512vnni, avx512, avx2, plain, or none if not compiled."""
    return _CAPABILITY


def quantize(x: Tensor, code: Code) -> Tensor:
    """The codes of `x`, in its shape and memory format."""
    if _COMPILED and x.is_cpu:
        return torch.ops.stepquant.quantize.default(x, *code)
    return reference.quantize(x, code)


def quantize_concat(x: Tensor, skip: Tensor, code: Code) -> Tensor:
    """The codes of `x` and `skip` side by side along the channels, without their float concatenation."""
    if _COMPILED and x.is_cpu:
        return torch.ops.stepquant.quantize_concat.default(x, skip, *code)
    return reference.quantize_concat(x, skip, code)


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
    if _COMPILED and x.is_cpu:
        return torch.ops.stepquant.group_norm.default(
            x, weight, bias, groups, eps, activation, add, scale, shift, skip
        )
    return reference.group_norm(x, weight, bias, groups, eps, activation, add, scale, shift, skip)


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
    if _COMPILED and x.is_cpu:
        return torch.ops.stepquant.group_norm_quantize.default(
            x, weight, bias, groups, eps, *code, activation, add, scale, shift, skip
        )
    return reference.group_norm_quantize(
        x, weight, bias, groups, eps, code, activation, add, scale, shift, skip
    )


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
    if _COMPILED and x.is_cpu:
        return torch.ops.stepquant.layer_norm_quantize.default(x, weight, bias, eps, *code, scale, shift)
    return reference.layer_norm_quantize(x, weight, bias, eps, code, scale, shift)


def activation_quantize(x: Tensor, activation: str, code: Code) -> Tensor:
    """The codes of an activation: 'silu', 'gelu', 'gelu_tanh', or 'geglu', 'swiglu', which halve the last dimension."""
    if _COMPILED and x.is_cpu:
        return torch.ops.stepquant.activation_quantize.default(x, activation, *code)
    return reference.activation_quantize(x, activation, code)


def upsample_nearest2x(x: Tensor) -> Tensor:
    """Bytes (batch, channels, height, width) with every pixel twice in both directions, channels densest."""
    if _COMPILED and x.is_cpu:
        return torch.ops.stepquant.upsample_nearest2x.default(x)
    return reference.upsample_nearest2x(x)


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
    """softmax(query key^T * scale) value in integers, for (batch, heads, tokens, width) of any strides.

    The result has the dtype of `query` and the memory of (batch, tokens, heads, width), so that
    `.transpose(1, 2).flatten(2)` is a view. The probabilities' zero point must be 0.
    """
    if _COMPILED and query.is_cpu:
        return torch.ops.stepquant.attention.default(
            query, key, value, scale, *query_code, *key_code, *value_code, *probabilities_code
        )
    return reference.attention(query, key, value, scale, query_code, key_code, value_code, probabilities_code)


class Product(NamedTuple):
    """A weight of signed bytes as `convolve` and `linear` read it, with what stands behind the sums."""

    weight: Tensor  # packed
    scale: Tensor  # per output channel
    sums: Tensor  # of each output channel's bytes, padded to whole groups of 16
    bias: Tensor | None
    kernel: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Product:
        """Of signed bytes (out, in, height, width)."""
        sums = torch.zeros((weight.shape[0] + 15) // 16 * 16, dtype=torch.int32)
        sums[: weight.shape[0]] = weight.sum((1, 2, 3), dtype=torch.int32)
        packed = torch.ops.stepquant.pack_weight.default(weight)
        return cls(packed, scale.float(), sums, bias, (weight.shape[2], weight.shape[3]))


def convolve(
    codes: Tensor,
    code: Code,
    product: Product,
    dtype: torch.dtype,
    add: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    sides: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    doubled: bool = False,
) -> Tensor:
    """The convolution of an image of codes, times both scales, plus bias, plus `add`, channels densest.

    `sides` (left, right, top, bottom) are padded with the zero point; `doubled` counts every pixel twice in both
    directions first.
    """
    weight, scale, sums, bias, kernel = product
    return torch.ops.stepquant.convolve.default(
        codes, code.scale, code.zero_point, weight, scale, sums, bias,
        kernel, stride, sides, dilation, doubled, dtype, add,
    )  # fmt: skip


def linear(
    codes: Tensor, code: Code, product: Product, dtype: torch.dtype, add: Tensor | None = None
) -> Tensor:
    """Rows of codes times the weight, times both scales, plus bias, plus `add`."""
    weight, scale, sums, bias, _ = product
    return torch.ops.stepquant.linear.default(
        codes, code.scale, code.zero_point, weight, scale, sums, bias, dtype, add
    )
