"""Example arguments of every operation, in the order of its schema; tests of all operations read them here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.runtime.ops import Code
from tests.runtime import reference

CODE = Code(0.02, 128, 0, 255)


@dataclass(frozen=True)
class Bytes:
    """A weight that an operation takes packed, each device in a layout of its own."""

    weight: Tensor


def examples() -> dict[str, tuple]:
    """A new operation is added here; what `pack_weight` packs stands as `Bytes`."""
    x = torch.randn(2, 32, 4, 6).contiguous(memory_format=torch.channels_last)
    skip, rows, tokens = torch.randn(2, 16, 4, 6), torch.randn(2, 48), torch.randn(2, 9, 32)
    heads = tokens.view(2, 9, 4, 8).transpose(1, 2)
    image = reference.quantize(torch.randn(2, 8, 5, 6), CODE)
    weight = torch.randint(-128, 128, (20, 8, 3, 3), dtype=torch.int8)
    point = weight[:, :, :1, :1].contiguous()
    scales, bias = torch.rand(20) * 1e-3, torch.randn(20)
    zeros, grouped = torch.randint(0, 16, (20, 3), dtype=torch.int16), torch.rand(20, 3)
    walk = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    wide, flat = (Bytes(weight), scales, sums_of(weight), bias), (Bytes(point), scales, sums_of(point), bias)
    return {
        "quantize": (x, *CODE, torch.rand(6)),
        "quantize_concat": (x, skip, *CODE),
        "move_codes": (
            torch.randint(0, 256, (2, 7, 5), dtype=torch.uint8),
            torch.arange(256, dtype=torch.uint8).flip(0),
        ),
        "group_norm": (x, None, None, 4, 1e-5, "silu", rows, None, None, skip),
        "group_norm_quantize": (x, None, None, 4, 1e-5, *CODE, "silu", rows, rows, rows, skip),
        "layer_norm_quantize": (tokens, None, None, 1e-5, *CODE),
        "rms_norm": (
            tokens,
            rows[0, :32],
            1e-5,
            torch.bfloat16,
            rows[:, :32],
            tokens.transpose(0, 1).reshape(2, 9, 32),
        ),
        "rms_norm_quantize": (tokens, None, 1e-5, *CODE, rows[:, :32], rows[:, 16:]),
        "rms_norm_rotary_quantize": (
            heads.transpose(1, 2),
            rows[0, :8],
            1e-5,
            False,
            torch.randn(1, 9, 8)[..., ::2],
            torch.randn(2, 9, 4),
            True,
            *CODE,
        ),
        "layer_norm_rotary_quantize": (
            heads.transpose(1, 2),
            rows[0, :8],
            rows[1, :8],
            1e-5,
            torch.randn(2, 9, 4),
            torch.randn(1, 9, 8)[..., ::2],
            False,
            *CODE,
        ),
        "activation_quantize": (tokens, "geglu", *CODE),
        "upsample_nearest2x": (reference.quantize(x, CODE),),
        "pack_weight": (weight,),
        "convolve": (image, 0.1, 3, *wide, *walk, False, torch.float32, torch.randn(2, 20, 5, 6)),
        "linear": (
            image[0].flatten(1).T.contiguous(),
            0.1,
            3,
            *flat,
            torch.float32,
            *torch.randn(2, 30, 20),
            torch.rand(30),
            torch.randn(30, 6),
            torch.randn(2, 6, 16, 1),
        ),
        "multiply_side": (tokens[0], torch.randn(2, 16, 16, 2).bfloat16(), 20),
        "row_scales": (tokens, -1, 127),
        "quantize_rows": (tokens, tokens.abs().amax(-1, keepdim=True) / 127, *CODE),
        "rotate_quantize_rows": (tokens, 16, *CODE, rows[0, :32]),
        "stored_linear": (
            rows,
            torch.randint(0, 256, (20 * 24,), dtype=torch.uint8),
            4,
            zeros,
            grouped,
            bias,
            torch.float32,
        ),
        "scale_rows": (rows, rows[:, :1].abs(), rows[0], -1, torch.bfloat16),
        "attention_by_row": (heads, heads, heads, 0.3, 127, 255),
        "attention": (heads, heads, heads, 0.3, *CODE, *CODE, *CODE, 1 / 255, 0, 0, 255),
    }


def sums_of(weight: Tensor) -> Tensor:
    """Of each output's bytes, padded as packed weights are."""
    sums = weight.sum((1, 2, 3), dtype=torch.int32)
    return torch.nn.functional.pad(sums, (0, -len(sums) % 16))


def packed(given: tuple, pack: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(pack(value.weight) if isinstance(value, Bytes) else value for value in given)


def arguments() -> dict[str, tuple]:
    """Of the operations that read no packed weight."""
    return {
        name: given
        for name, given in examples().items()
        if not any(isinstance(value, Bytes) for value in given)
    }
