"""Bit packing: integers of 2 to 8 bits in a dense stream of bytes, lowest bits first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepquant.core.affine import quantize
from stepquant.core.grid import Grid, GridError
from stepquant.core.slices import AT_ONCE


def packed_bytes(count: int, bits: int) -> int:
    return math.ceil(count * bits / 8)


def pack(q: Tensor, grid: Grid) -> Tensor:
    """Dense uint8 stream of the integers `q` (any shape, any integer or float storage)."""
    codes = (q.reshape(-1).to(torch.int16) - grid.qmin).to(torch.uint8)
    if grid.bits == 8:
        return codes
    places = torch.arange(grid.bits, dtype=torch.uint8, device=codes.device)
    bits = (codes[:, None] >> places & 1).reshape(-1)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def pack_nearest(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The stream of rows rounded to nearest, each by its own scale; some rows after others."""
    at_once = max(AT_ONCE // (64 * rows.shape[1]), 1) * 8  # of any bits, eight numbers end with a byte
    packed = torch.empty(packed_bytes(rows.numel(), grid.bits), dtype=torch.uint8, device=rows.device)
    parts = (value.split(at_once) for value in (rows, scale, zero_point))
    into = packed.split(packed_bytes(at_once * rows.shape[1], grid.bits))
    for some, scales, zero_points, stream in zip(*parts, into):
        stream.copy_(pack(quantize(some, scales[:, None], zero_points[:, None], grid), grid))
    return packed


def unpack(data: Tensor, grid: Grid, count: int) -> Tensor:
    """The first `count` integers of a packed stream, as int16 (uint8 grids do not fit int8)."""
    if data.numel() != packed_bytes(count, grid.bits):
        raise GridError(
            f"{count} integers of {grid.bits} bits fill {packed_bytes(count, grid.bits)} bytes, not {data.numel()}"
        )
    if 8 % grid.bits == 0:  # each byte holds the same number of them
        places = torch.arange(0, 8, grid.bits, dtype=torch.uint8, device=data.device)
        codes = (data.reshape(-1, 1) >> places).reshape(-1)[:count] & 2**grid.bits - 1
        return codes.to(torch.int16) + grid.qmin
    places = torch.arange(8, device=data.device)
    bits = (data.reshape(-1)[:, None] >> places.to(torch.uint8) & 1).reshape(-1)
    bits = bits[: count * grid.bits].reshape(count, grid.bits)
    return (bits.to(torch.int16) << places[: grid.bits].to(torch.int16)).sum(1, dtype=torch.int16) + grid.qmin
