"""What every operation computes in plain torch, by name; products take the signed bytes as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.ops.elementwise import activate
from stepquant.runtime.ops.norms import affine, modulated, normed, standardized

__all__ = ["activate", "affine", "modulated", "normed", "standardized"]

quantize = ops.quantize.plain
quantize_concat = ops.quantize_concat.plain
group_norm = ops.group_norm.plain
group_norm_quantize = ops.group_norm_quantize.plain
layer_norm_quantize = ops.layer_norm_quantize.plain
rms_norm = ops.rms_norm.plain
rms_norm_quantize = ops.rms_norm_quantize.plain
rms_norm_rotary_quantize = ops.rms_norm_rotary_quantize.plain
layer_norm_rotary_quantize = ops.layer_norm_rotary_quantize.plain
activation_quantize = ops.activation_quantize.plain
upsample_nearest2x = ops.upsample_nearest2x.plain
attention = ops.attention.plain


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
    row_scale: Tensor | None = None,
) -> Tensor:
    packed, sums = ops.pack_weight.plain(weight), weight.sum((1, 2, 3), dtype=torch.int32)
    return ops.convolve.plain(
        codes, code_scale, zero_point, packed, weight_scale, sums, bias,
        weight.shape[2:], stride, sides, dilation, doubled, dtype, add, row_scale,
    )  # fmt: skip


def linear(
    codes: Tensor,
    code_scale: float,
    zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    add: Tensor | None = None,
    gate: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    packed, sums = ops.pack_weight.plain(weight[:, :, None, None]), weight.sum(1, dtype=torch.int32)
    return ops.linear.plain(
        codes, code_scale, zero_point, packed, weight_scale, sums, bias, dtype, add, gate, row_scale
    )
