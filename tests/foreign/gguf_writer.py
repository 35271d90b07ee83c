"""GGUF files, bit by bit from the published layout of their blocks, one number after the other, and what they stand for."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
Block = bytearray
Write = Callable[[Block, Sequence[int], Sequence[int], Sequence[int]], None]


@dataclass(frozen=True)
class Kind:
    """A type of blocks: codes of `bits` bits less `zero`, and scales that are integers where `scale_bits` says so."""

    number: int
    numbers: int
    bytes: int
    bits: int
    zero: int
    groups: int
    at: tuple[int, ...]  # bytes of the scale, and of the offset where there is one
    write: Write  # codes, scales and offsets but for the numbers in 16 bits
    scale_bits: int = 0
    scale_zero: int = 0


def q8_0(block: Block, codes: Sequence[int], *_: object) -> None:
    for i, code in enumerate(codes):
        block[2 + i] = code ^ 128  # two's complement of what is 128 less


def nibbles_of_32(at: int, high_at: int = 0) -> Write:
    def write(block: Block, codes: Sequence[int], *_: object) -> None:
        for i, code in enumerate(codes):
            block[at + i % 16] |= (code & 15) << 4 * (i // 16)
            if high_at:
                block[high_at + i // 8] |= (code >> 4) << i % 8

    return write


def q2_k(block: Block, codes: Sequence[int], scales: Sequence[int], offsets: Sequence[int]) -> None:
    for i, code in enumerate(codes):
        block[16 + 32 * (i // 128) + i % 32] |= code << 2 * (i % 128 // 32)
    for j in range(16):
        block[j] = scales[j] | offsets[j] << 4


def q3_k(block: Block, codes: Sequence[int], scales: Sequence[int], _: Sequence[int]) -> None:
    for i, code in enumerate(codes):
        block[32 + 32 * (i // 128) + i % 32] |= (code & 3) << 2 * (i % 128 // 32)
        block[i % 32] |= (code >> 2) << i // 32
    for j in range(16):
        block[96 + j % 8] |= (scales[j] & 15) << 4 * (j // 8)
        block[104 + j % 4] |= (scales[j] >> 4) << 2 * (j // 4)


def six_bits(block: Block, scales: Sequence[int], offsets: Sequence[int]) -> None:
    for j in range(4):
        block[4 + j] |= scales[j] | (scales[j + 4] >> 4) << 6
        block[8 + j] |= offsets[j] | (offsets[j + 4] >> 4) << 6
        block[12 + j] |= scales[j + 4] & 15 | (offsets[j + 4] & 15) << 4


def q45_k(at: int, high_at: int = 0) -> Write:
    def write(block: Block, codes: Sequence[int], scales: Sequence[int], offsets: Sequence[int]) -> None:
        six_bits(block, scales, offsets)
        for i, code in enumerate(codes):
            block[at + 32 * (i // 64) + i % 32] |= (code & 15) << 4 * (i % 64 // 32)
            if high_at:
                block[high_at + i % 32] |= (code >> 4) << i // 32

    return write


def q6_k(block: Block, codes: Sequence[int], scales: Sequence[int], _: Sequence[int]) -> None:
    for i, code in enumerate(codes):
        block[64 * (i // 128) + i % 64] |= (code & 15) << 4 * (i % 128 // 64)
        block[128 + 32 * (i // 128) + i % 32] |= (code >> 4) << 2 * (i % 128 // 32)
    for j in range(16):
        block[192 + j] = scales[j] ^ 128


KINDS = {
    "Q8_0": Kind(8, 32, 34, 8, 128, 1, (0,), q8_0),
    "Q4_0": Kind(2, 32, 18, 4, 8, 1, (0,), nibbles_of_32(2)),
    "Q4_1": Kind(3, 32, 20, 4, 0, 1, (0, 2), nibbles_of_32(4)),
    "Q5_0": Kind(6, 32, 22, 5, 16, 1, (0,), nibbles_of_32(6, 2)),
    "Q5_1": Kind(7, 32, 24, 5, 0, 1, (0, 2), nibbles_of_32(8, 4)),
    "Q2_K": Kind(10, 256, 84, 2, 0, 16, (80, 82), q2_k, 4),
    "Q3_K": Kind(11, 256, 110, 3, 4, 16, (108,), q3_k, 6, 32),
    "Q4_K": Kind(12, 256, 144, 4, 0, 8, (0, 2), q45_k(16), 6),
    "Q5_K": Kind(13, 256, 176, 5, 0, 8, (0, 2), q45_k(48, 16), 6),
    "Q6_K": Kind(14, 256, 210, 6, 32, 16, (208,), q6_k, 8, 128),
}


@dataclass(frozen=True)
class Packed:
    """A tensor in blocks, and the numbers that they stand for."""

    kind: str
    shape: tuple[int, ...]
    data: bytes
    weight: Tensor


def block_of(
    kind: Kind,
    codes: Sequence[int],
    halves: Sequence[float],
    scales: Sequence[int] = (),
    offsets: Sequence[int] = (),
) -> tuple[bytes, list[np.float32]]:
    """The bytes of a block, and its numbers; codes and scales as they are stored, from 0 on."""
    block = Block(kind.bytes)
    kind.write(block, codes, scales, offsets)
    for at, number in zip(kind.at, halves):
        struct.pack_into("<e", block, at, number)
    d, m = (np.float32(np.float16(number)) for number in (*halves, 0.0)[:2])
    numbers, width = [], kind.numbers // kind.groups
    for i, code in enumerate(codes):
        scale = d * np.float32(scales[i // width] - kind.scale_zero) if kind.scale_bits else d
        number = scale * np.float32(code - kind.zero)
        if len(kind.at) == 2:
            number = number - m * np.float32(offsets[i // width]) if kind.scale_bits else number + m
        numbers.append(number)
    return bytes(block), numbers


def rounded(name: str, weight: Tensor) -> Packed:
    """Blocks near to the weight: the least and the most of a block are the ends of its codes."""
    kind = KINDS[name]
    data, numbers = [], []
    for values in weight.reshape(-1, kind.numbers).double().tolist():
        least, most, top = min(*values, 0.0), max(map(abs, values)), 2**kind.bits - 1
        if len(kind.at) == 2:  # code * d + m, with m below 0 stored without its sign by K-blocks
            d, m = (max(values) - least) / top or 1.0, least
        else:
            d, m = most / kind.zero or 1.0, 0.0
        whole = 2 ** (kind.scale_bits - 1) - 1 - kind.scale_zero // 2 if kind.scale_bits else 1
        d = float(np.float16(d / whole))
        codes = [min(max(round((v - m) / (d * whole)) + kind.zero, 0), top) for v in values]
        scales = [whole + kind.scale_zero] * kind.groups
        block, made = block_of(kind, codes, (d, -m if kind.scale_bits else m), scales, [1] * kind.groups)
        data.append(block)
        numbers += made
    return Packed(
        name, tuple(weight.shape), b"".join(data), torch.from_numpy(np.array(numbers)).reshape(weight.shape)
    )


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word.encode())) + word.encode()


def value(given: Any) -> bytes:
    """Text, a number of 32 bits, or a list of such."""
    if isinstance(given, str):
        return struct.pack("<I", 8) + text(given)
    if isinstance(given, int):
        return struct.pack("<II", 4, given)
    return struct.pack("<IIQ", 9, 5, len(given)) + struct.pack(f"<{len(given)}i", *given)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor | Packed],
    metadata: Mapping[str, Any] | None = None,
    alignment: int = 32,
) -> Path:
    """Floats and blocks; where the last dimension cannot hold blocks, in rows of 256 with the shape in the metadata."""
    words = {"general.architecture": "some", "general.alignment": alignment, **(metadata or {})}
    heads, bodies, at = [], [], 0
    for name, tensor in tensors.items():
        packed, shape = isinstance(tensor, Packed), tuple(tensor.shape)
        if packed and shape[-1] % KINDS[tensor.kind].numbers:
            words[f"comfy.gguf.orig_shape.{name}"] = list(shape)
            shape = (math.prod(shape) // 256, 256)
        data = tensor.data if packed else tensor.contiguous().view(torch.uint8).numpy().tobytes()
        number = KINDS[tensor.kind].number if packed else FLOATS[tensor.dtype]
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        heads.append(text(name) + dimensions + struct.pack("<IQ", number, at))
        bodies.append(data + bytes(-len(data) % alignment))
        at += len(bodies[-1])
    said = b"".join(text(key) + value(word) for key, word in words.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(words)) + said + b"".join(heads)
    path.write_bytes(head + bytes(-len(head) % alignment) + b"".join(bodies))
    return path
