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
    return pack_codes((q.reshape(-1).to(torch.int16) - grid.qmin).to(torch.uint8), grid.bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The stream of bytes that hold numbers from 0 on."""
    if bits == 8:
        return codes
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    single = (codes[:, None] >> places & 1).reshape(-1)
    single = torch.nn.functional.pad(single, (0, -single.numel() % 8)).reshape(-1, 8)
    return (single << torch.arange(8, dtype=torch.uint8, device=single.device)).sum(1, dtype=torch.uint8)


def pack_nearest(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The stream of rows rounded to nearest, each by its own scale; some rows after others."""
    at_once = max(AT_ONCE // (64 * rows.shape[1]), 1) * 8  # of any bits, eight numbers end with a byte
    packed = torch.empty(packed_bytes(rows.numel(), grid.bits), dtype=torch.uint8, device=rows.device)
    parts = (value.split(at_once) for value in (rows, scale, zero_point))
    into = packed.split(packed_bytes(at_once * rows.shape[1], grid.bits))
    for some, scales, zero_points, stream in zip(*parts, into):
        stream.copy_(pack(quantize(some, scales[:, None], zero_points[:, None], grid), grid))
    return packed


def unpack(data: Tensor, grid: Grid, count: int, codebook: Tensor | None = None) -> Tensor:
    """The first `count` integers of a packed stream, as int16 (uint8 grids do not fit int8); or those that codes of rows name."""
    codes = unpack_codes(data, grid.bits, count)
    if codebook is None:
        return codes + grid.qmin
    return codebook.to(torch.int16).gather(1, codes.reshape(len(codebook), -1).long()).reshape(-1)


def unpack_codes(data: Tensor, width: int, count: int) -> Tensor:
    """The first `count` numbers of a stream, from 0 on."""
    if data.numel() != packed_bytes(count, width):
        raise GridError(
            f"{count} integers of {width} bits fill {packed_bytes(count, width)} bytes, not {data.numel()}"
        )
    if 8 % width == 0:  # each byte holds the same number of them
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
        return ((data.reshape(-1, 1) >> places).reshape(-1)[:count] & 2**width - 1).to(torch.int16)
    places = torch.arange(8, device=data.device)
    bits = (data.reshape(-1)[:, None] >> places.to(torch.uint8) & 1).reshape(-1)
    bits = bits[: count * width].reshape(count, width)
    return (bits.to(torch.int16) << places[:width].to(torch.int16)).sum(1, dtype=torch.int16)
