"""Codes: unsigned bytes that stand for numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.core.grid import Grid


class Code(NamedTuple):
    """Where a number lands in a byte: clamp(round(x * (1 / scale)) + zero_point, low, high), always unsigned.

    The integer q of a signed grid is stored as q + 128; its zero point and limits are raised by 128 too.
    """

    scale: float
    zero_point: int = 128
    low: int = 0
    high: int = 255

    @classmethod
    def of_grid(cls, grid: Grid, scale: float, zero_point: int = 0) -> Code:
        offset = 128 if grid.signed else 0
        return cls(float(scale), int(zero_point) + offset, grid.qmin + offset, grid.qmax + offset)

    @classmethod
    def of_rows(
        cls,
        grid: Grid,
        scales: Sequence[float],
        zero_points: Sequence[int],
        bits: Sequence[int] | None = None,
    ) -> tuple[Code, ...]:
        """One for each row of the ranges of a tensor, which may have bits of its own."""
        grids = [grid] * len(scales) if bits is None else [replace(grid, bits=own) for own in bits]
        return tuple(cls.of_grid(*one) for one in zip(grids, scales, zero_points))


def codes(x: Tensor, code: Code) -> Tensor:
    """The bytes of numbers: arithmetic is in float32, rounding half to even."""
    q = torch.round(x.float() * single(code.scale).reciprocal()) + code.zero_point
    return q.clamp(code.low, code.high).to(torch.uint8)


def centred(x: Tensor, code: Code) -> Tensor:
    """The integers that the codes of `x` stand for, zero point subtracted, in the type that sums them exactly."""
    return exact(codes(x, code)) - code.zero_point


def exact(x: Tensor) -> Tensor:
    """In float64, whose sums of products of bytes have no error; in float32 on a device that has no float64."""
    return x.float() if x.device.type == "mps" else x.double()


def single(number: float) -> Tensor:
    return torch.full((), number, dtype=torch.float32)


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channels (dimension 1) densest in memory."""
    out = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return out.copy_(x)
