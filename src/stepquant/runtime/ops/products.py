"""Convolutions and GEMMs of codes with a weight of signed bytes: exact 32-bit sums, then an epilogue in float32.

And of floats with a weight as files hold it, which is never written out in floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.runtime.ops.code import Code, channels_last, exact, single
from stepquant.runtime.ops.operation import Operation

# Every layout is padded to a multiple of so many outputs and inputs.
OUTPUTS, INPUTS = 16, 4
WORD = 4  # bytes; the numbers of a side of a branch are packed by the word


@Operation
def pack_weight(weight: Tensor) -> Tensor:
    """Signed bytes (out, in, height, width) in the layout that the products of this device read."""
    outs, ins = weight.shape[:2]
    return F.pad(weight, (0, 0, 0, 0, 0, -ins % INPUTS, 0, -outs % OUTPUTS)).flatten()


@Operation
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
    row_scale: Tensor | None = None,
) -> Tensor:
    """The convolution of images of codes, times the scales, plus bias, plus `add`, channels densest.

    `sides` (left, right, top, bottom) are padded with the zero point; `doubled` counts every pixel twice in both
    directions first. `weight` is packed, `weight_sum` the sum of each output's bytes. `row_scale` has one number for each image.
    """
    bytes_of = unpacked(weight, weight_scale.shape[0], codes.shape[1], kernel)
    x = exact(codes) - zero_point
    x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2) if doubled else x
    sums = F.conv2d(F.pad(x, list(sides)), exact(bytes_of), None, tuple(stride), 0, tuple(dilation))
    images = row_scale if row_scale is None else row_scale.reshape(-1, 1, 1, 1)
    return channels_last(
        epilogue(sums, code_scale, weight_scale, bias, dtype, add, (1, -1, 1, 1), None, images)
    )


@Operation
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
    gate: Tensor | None = None,
    row_scale: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Rows of codes times the packed weight, times the scales, plus bias, plus `low` times `up`, times `gate`, plus `add`.

    `gate` is (samples, outputs), and every sample has as many rows; `row_scale` has one number for each row. `low` is what
    `multiply_side` makes of the input, `up` the other side of the branch, packed.
    """
    bytes_of = unpacked(weight, weight_scale.shape[0], codes.shape[1], (1, 1))
    sums = (exact(codes) - zero_point) @ exact(bytes_of.flatten(1)).T
    gates = gate if gate is None else gate.repeat_interleave(codes.shape[0] // max(gate.shape[0], 1), 0)
    rows = row_scale if row_scale is None else row_scale.reshape(-1, 1)
    branch = None
    if low is not None and up is not None:
        branch = (
            low.to(up.dtype).float() @ unpacked_side(up)[: weight_scale.shape[0], : low.shape[1]].float().T
        )
    return epilogue(sums, code_scale, weight_scale, bias, dtype, add, (1, -1), gates, rows, branch)


@Operation
def multiply_side(x: Tensor, side: Tensor, outs: int) -> Tensor:
    """Rows of numbers times one packed side of a branch, summed in float32, all else in the dtype of the side."""
    numbers = unpacked_side(side)[:outs, : x.shape[1]].float()
    return (x.to(side.dtype).float() @ numbers.T).to(side.dtype)


@Operation
def stored_linear(
    x: Tensor,
    weight: Tensor,
    bits: int,
    zero_point: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of numbers times a weight of packed integers from zero up, of 4 or 8 bits, plus bias.

    `scale` and `zero_point` (outputs, groups) are of equal runs of an output's inputs. Sums are float64, rounded once, so
    that the order of additions does not show.
    """
    codes = weight if bits == 8 else torch.stack([weight & 15, weight >> 4], dim=-1)
    centred = codes.reshape(*scale.shape, -1).double() - zero_point.double()[..., None]
    sums = torch.einsum("rgi,ogi->rog", x.double().reshape(len(x), scale.shape[1], -1), centred)
    y = (sums * scale.double()).sum(-1)
    return (y if bias is None else y + bias.double()).float().to(dtype)


def pack_side(side: Tensor, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs) as (group of OUTPUTS, word of inputs, output of the group, number of the word)."""
    outs, ins = side.shape
    numbers = WORD // dtype.itemsize
    padded = F.pad(side.to(dtype), (0, -ins % numbers, 0, -outs % OUTPUTS))
    return padded.reshape(-1, OUTPUTS, padded.shape[1] // numbers, numbers).transpose(1, 2).contiguous()


def unpacked_side(packed: Tensor) -> Tensor:
    """What `pack_side` packed, with zeros behind."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)


def unpacked(weight: Tensor, outs: int, ins: int, kernel: Sequence[int]) -> Tensor:
    """The signed bytes that `pack_weight` laid out plainly."""
    return weight.reshape(outs + -outs % OUTPUTS, ins + -ins % INPUTS, *kernel)[:outs, :ins]


def epilogue(
    sums: Tensor,
    code_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    add: Tensor | None,
    shape: tuple[int, ...],
    gate: Tensor | None = None,
    row_scale: Tensor | None = None,
    branch: Tensor | None = None,
) -> Tensor:
    """The scales, bias, `branch`, `gate` and `add`, in float32, with one rounding to `dtype` at the end."""
    y = sums.float() * (weight_scale.float() * single(code_scale)).reshape(shape)
    y = y if row_scale is None else y * row_scale.float()
    y = y if bias is None else y + bias.float().reshape(shape)
    y = y if branch is None else y + branch
    y = y if gate is None else y * gate.float()
    return (y if add is None else y + add.to(dtype).float()).to(dtype)


class Product(NamedTuple):
    """A packed weight of signed bytes, with what the epilogue needs."""

    weight: Tensor  # packed
    scale: Tensor  # per output channel
    sums: Tensor  # of each output channel's bytes, padded to a multiple of OUTPUTS
    bias: Tensor | None
    kernel: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Product:
        """Of signed bytes (out, in, height, width)."""
        outs, _, high, wide = weight.shape
        sums = F.pad(weight.sum((1, 2, 3), dtype=torch.int32), (0, -outs % OUTPUTS))
        return cls(pack_weight(weight), scale.float(), sums, bias, (high, wide))

    def convolve(
        self,
        codes: Tensor,
        code: Code,
        dtype: torch.dtype,
        add: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        sides: Sequence[int] = (0, 0, 0, 0),
        dilation: Sequence[int] = (1, 1),
        doubled: bool = False,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        weight, scale, sums, bias, kernel = self
        return convolve(
            codes, code.scale, code.zero_point, weight, scale, sums, bias,
            kernel, stride, sides, dilation, doubled, dtype, add, row_scale,
        )  # fmt: skip

    def linear(
        self,
        codes: Tensor,
        code: Code,
        dtype: torch.dtype,
        add: Tensor | None = None,
        gate: Tensor | None = None,
        row_scale: Tensor | None = None,
        low: Tensor | None = None,
        up: Tensor | None = None,
    ) -> Tensor:
        weight, scale, sums, bias, _ = self
        return linear(
            codes, code.scale, code.zero_point, weight, scale, sums, bias,
            dtype, add, gate, row_scale, low, up,
        )  # fmt: skip
