"""GGUF files, tensor by tensor: a header of names, shapes and types, and behind it the numbers, in blocks or as they are."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from stepquant.progress import Progress

MAGIC, VERSION = b"GGUF", 3
ALIGNED = 32  # every tensor begins at a multiple of it, counted from the end of the header
BLOCK = 32  # numbers that share a scale
UINT32, STRING = 4, 8  # types of metadata
BLOCKS_VERSION = 2  # of the layout of blocks


@dataclass(frozen=True)
class Kind:
    """A type of tensors, by its name and number in such files, and how many bytes so many numbers take."""

    name: str
    number: int
    bytes: int
    dtype: torch.dtype = torch.uint8
    together: int = 1


@dataclass(frozen=True)
class Block(Kind):
    """A type whose numbers come in blocks."""

    together: int = BLOCK

    def pack(self, integers: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
        """The bytes of each block: its scale, for Q4_1 what a zero of its integers stands for, and the integers."""
        head = [scales]
        if self.number == Q4_1.number:
            head.append((-zero_points * scales.float()).half())
            codes = integers
        else:
            codes = integers - zero_points + (8 if self.number == Q4_0.number else 0)
        if self.number == Q8_0.number:
            packed = codes.to(torch.int8).view(torch.uint8)
        else:
            low, high = codes.to(torch.uint8).chunk(2, 1)
            packed = low | high << 4
        return torch.cat([*(one.contiguous().view(torch.uint8) for one in head), packed], 1)


F32, F16 = Kind("F32", 0, 4, torch.float32), Kind("F16", 1, 2, torch.float16)
Q4_0, Q4_1, Q8_0 = Block("Q4_0", 2, 18), Block("Q4_1", 3, 20), Block("Q8_0", 8, 34)
FILE_TYPES = {F32.name: 0, F16.name: 1, Q4_0.name: 2, Q4_1.name: 3, Q8_0.name: 7}  # mostly of such tensors

Tensors = Mapping[str, tuple[Kind, tuple[int, ...], Callable[[], Tensor]]]


def size_of(kind: Kind, shape: tuple[int, ...]) -> int:
    return prod(shape) // kind.together * kind.bytes


def write_gguf(file: Path, tensors: Tensors, architecture: str | None, progress: Progress) -> None:
    """`architecture` is what programs on ggml call the network; without one they look at the names."""
    sizes = {kind.name: 0 for kind, _, _ in tensors.values()}
    for kind, shape, _ in tensors.values():
        sizes[kind.name] += prod(shape)
    told = (
        [] if architecture is None else [text("general.architecture") + number(STRING) + text(architecture)]
    )
    mostly = FILE_TYPES[max(sizes, key=sizes.__getitem__)]
    for key, said in (("general.file_type", mostly), ("general.quantization_version", BLOCKS_VERSION)):
        told.append(text(key) + number(UINT32) + number(said))
    infos, end = [], 0
    for name, (kind, shape, _) in tensors.items():
        sides = shape or (1,)
        dimensions = number(len(sides)) + b"".join(map(long, reversed(sides)))  # the innermost first
        infos.append(text(name) + dimensions + number(kind.number) + long(end))
        end += aligned(size_of(kind, shape))
    header = MAGIC + number(VERSION) + long(len(tensors)) + long(len(told)) + b"".join([*told, *infos])
    with file.open("wb") as out:
        out.write(filled(header))
        for name in progress.track(tensors, "writing", len(tensors)):
            kind, shape, value = tensors[name]
            data = value().contiguous().reshape(-1).view(torch.uint8).numpy()
            assert data.size == size_of(kind, shape), f"the bytes of '{name}' are not those of its header"
            out.write(data.tobytes())
            out.write(b"\0" * (aligned(data.size) - data.size))


def text(words: str) -> bytes:
    return long(len(words.encode())) + words.encode()


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def long(value: int) -> bytes:
    return struct.pack("<Q", value)


def aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def filled(data: bytes) -> bytes:
    return data + b"\0" * (aligned(len(data)) - len(data))
