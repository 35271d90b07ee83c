"""The blocks of GGUF: how the bytes of some numbers that lie side by side in a row become integers, scales and offsets.

Blocks of 32 have their scales in 16 bits. K-blocks of 256 have integers for scales, which share one scale in 16 bits.
The least bits of integers come first; where bytes hold several of them, those of the least bits are the first numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# From the bytes (blocks, bytes): codes (blocks, numbers); scales, and offsets if there are any, (blocks, groups).
Parts = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class BlockType:
    """One type of quantized blocks."""

    name: str
    numbers: int  # in a block
    bytes: int  # of a block
    bits: int  # of a code
    signed: bool
    groups: int  # of a block, each with a scale
    parts: Callable[[Tensor], Parts]

    @property
    def group(self) -> int:
        return self.numbers // self.groups


def half(block: Tensor, at: int) -> Tensor:
    """The number in 16 bits at this byte of each block."""
    return block[:, at : at + 2].contiguous().view(torch.float16).float()


def fields(data: Tensor, run: int, bits: int) -> Tensor:
    """Integers of so many bits: of every run of bytes first all their least bits, then the next."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    cut = data.reshape(len(data), -1, 1, run) >> places[:, None] & (1 << bits) - 1
    return cut.reshape(len(data), -1)


def bits_of_word(data: Tensor) -> Tensor:
    """The 32 bits of four bytes, the least first."""
    return (data[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).reshape(len(data), 32)


def centred(codes: Tensor, zero: int) -> Tensor:
    return (codes.to(torch.int16) - zero).to(torch.int8)


def q8_0(block: Tensor) -> Parts:
    return block[:, 2:].contiguous().view(torch.int8), half(block, 0), None


def q4_0(block: Tensor) -> Parts:
    return centred(fields(block[:, 2:], 16, 4), 8), half(block, 0), None


def q4_1(block: Tensor) -> Parts:
    return fields(block[:, 4:], 16, 4), half(block, 0), half(block, 2)


def q5_0(block: Tensor) -> Parts:
    codes = fields(block[:, 6:], 16, 4) | bits_of_word(block[:, 2:6]) << 4
    return centred(codes, 16), half(block, 0), None


def q5_1(block: Tensor) -> Parts:
    codes = fields(block[:, 8:], 16, 4) | bits_of_word(block[:, 4:8]) << 4
    return codes, half(block, 0), half(block, 2)


def q2_k(block: Tensor) -> Parts:
    small = block[:, :16]
    return fields(block[:, 16:80], 32, 2), half(block, 80) * (small & 15), -(half(block, 82) * (small >> 4))


def q3_k(block: Tensor) -> Parts:
    codes = fields(block[:, 32:96], 32, 2) | fields(block[:, :32], 32, 1) << 2
    scales = fields(block[:, 96:104], 8, 4) | fields(block[:, 104:108], 4, 2) << 4
    return centred(codes, 4), half(block, 108) * centred(scales, 32), None


def q4_k(block: Tensor) -> Parts:
    scales, offsets = six_bits(block)
    return fields(block[:, 16:], 32, 4), scales, offsets


def q5_k(block: Tensor) -> Parts:
    scales, offsets = six_bits(block)
    return fields(block[:, 48:], 32, 4) | fields(block[:, 16:48], 32, 1) << 4, scales, offsets


def six_bits(block: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight offsets of 6 bits each: of the last four, the upper two bits lie beside the first four."""
    first, second, third = block[:, 4:16].split(4, 1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
    offsets = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)
    return half(block, 0) * scales, -(half(block, 2) * offsets)


def q6_k(block: Tensor) -> Parts:
    codes = fields(block[:, :128], 64, 4) | fields(block[:, 128:192], 32, 2) << 4
    return centred(codes, 32), half(block, 208) * block[:, 192:208].contiguous().view(torch.int8), None


# By their numbers in files.
BLOCKS = {
    2: BlockType("Q4_0", 32, 18, 4, True, 1, q4_0),
    3: BlockType("Q4_1", 32, 20, 4, False, 1, q4_1),
    6: BlockType("Q5_0", 32, 22, 5, True, 1, q5_0),
    7: BlockType("Q5_1", 32, 24, 5, False, 1, q5_1),
    8: BlockType("Q8_0", 32, 34, 8, True, 1, q8_0),
    10: BlockType("Q2_K", 256, 84, 2, False, 16, q2_k),
    11: BlockType("Q3_K", 256, 110, 3, True, 16, q3_k),
    12: BlockType("Q4_K", 256, 144, 4, False, 8, q4_k),
    13: BlockType("Q5_K", 256, 176, 5, False, 8, q5_k),
    14: BlockType("Q6_K", 256, 210, 6, True, 16, q6_k),
}
