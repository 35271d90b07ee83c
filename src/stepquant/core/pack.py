"""Bit packing: integers of 2 to 8 bits in a dense stream of bytes, lowest bits first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepquant.core.grid import Grid, GridError


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


def unpack(data: Tensor, grid: Grid, count: int) -> Tensor:
    """The first `count` integers of a packed stream, as int16 (uint8 grids do not fit int8)."""
    if data.numel() != packed_bytes(count, grid.bits):
        raise GridError(
            f"{count} integers of {grid.bits} bits fill {packed_bytes(count, grid.bits)} bytes, not {data.numel()}"
        )
    if grid.bits == 8:
        return data.reshape(-1).to(torch.int16) + grid.qmin
    places = torch.arange(8, device=data.device)
    bits = (data.reshape(-1)[:, None] >> places.to(torch.uint8) & 1).reshape(-1)
    bits = bits[: count * grid.bits].reshape(count, grid.bits)
    return (bits.to(torch.int16) << places[: grid.bits].to(torch.int16)).sum(1, dtype=torch.int16) + grid.qmin
