"""A GGUF file: its header, checked against the size of the file, and its tensors where they lie."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepquant.core.entries import shown
from stepquant.errors import ArtifactError
from stepquant.hub.foreign.blocks import BLOCKS, BlockType
from stepquant.hub.foreign.container import Container, Entry, prefix_of
from stepquant.hub.foreign.network import ForeignFile, ForeignLayer
from stepquant.hub.foreign.rows import Rows

MAGIC, VERSIONS = b"GGUF", (2, 3)
# What metadata holds, by its number: `struct`'s letter for it. Beside these, text and lists.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
FLOATS = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    28: ("F64", torch.float64),
    30: ("BF16", torch.bfloat16),
}
# Types whose blocks are not read: the codes of most stand for points of a lattice.
UNREAD = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
ALIGNMENT, ARCHITECTURE = "general.alignment", "general.architecture"
SHAPE = "comfy.gguf.orig_shape."  # before a tensor's name: its shape, where its numbers lie in rows of another length
MOST_DIMENSIONS = 8
AGAIN = "fetch the file again: it may have been cut off"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, and what its bytes are."""

    type: int
    shape: tuple[int, ...]
    begin: int
    bytes: int

    @property
    def name(self) -> str:
        return BLOCKS[self.type].name if self.type in BLOCKS else FLOATS[self.type][0]


@dataclass(frozen=True)
class GgufTensors:
    """Answers with floats, or with the bytes of blocks, (blocks, bytes)."""

    data: Any  # the file, of which nothing is in memory before it is read
    places: Mapping[str, Place]

    def get_tensor(self, name: str) -> Tensor:
        place = self.places[name]
        raw = torch.from_numpy(np.array(self.data[place.begin : place.begin + place.bytes]))
        if place.type in BLOCKS:
            return raw.reshape(-1, BLOCKS[place.type].bytes)
        return raw.view(FLOATS[place.type][1]).reshape(place.shape)


@dataclass(frozen=True)
class GgufLayer(ForeignLayer):
    """A tensor in blocks."""

    type: BlockType
    leaf: str = ".weight"  # behind the path; a tensor that is no weight of a layer has none

    @property
    def weight(self) -> str:
        return self.path + self.leaf

    @property
    def format(self) -> str:
        return self.type.name

    @property
    def shared(self) -> str:
        return f"{self.type.group} inputs"

    @property
    def why_float(self) -> str:
        if len(self.shape) < 2 or not self.leaf:
            return "it is no weight of a layer"
        if math.prod(self.shape[1:]) % self.type.group:
            return f"groups of {self.type.group} numbers go on from row to row"
        return ""

    def rows(self, file: Container) -> Rows:
        return self.blocks(file).reshape(self.shape[0])

    def floats(self, file: Container) -> Tensor:
        return self.blocks(file).floats().reshape(self.shape)

    def blocks(self, file: Container) -> Rows:
        """A row for each block."""
        codes, scales, offsets = self.type.parts(file.read(self.weight))
        return Rows(self.type.bits, self.type.signed, codes, scales, offsets)


class Header:
    """Reads one thing after the other, and never beyond the end."""

    def __init__(self, path: Path, data: Any) -> None:
        self.path, self.data, self.at = path, data, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise damaged(
                self.path, f"its header ends at byte {len(self.data)}", f"{count} bytes at {self.at}"
            )
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.bytes(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="backslashreplace")

    def tensor(self) -> tuple[int, tuple[int, ...], int]:
        """Its type, shape, and byte behind the header."""
        dimensions = self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise damaged(self.path, f"a tensor of {dimensions} dimensions", f"at most {MOST_DIMENSIONS}")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        return self.number("I"), shape, self.number("Q")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise damaged(self.path, f"metadata of kind {kind}", "a kind of GGUF")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            letter = NUMBERS[inner]
            return list(struct.unpack(f"<{count}{letter}", self.bytes(count * struct.calcsize(f"<{letter}"))))
        if inner != TEXT:
            raise damaged(self.path, f"a list of kind {inner}", "a list of numbers or of text")
        return [self.text() for _ in range(count)]


def damaged(path: Path, got: object, expected: object) -> ArtifactError:
    return ArtifactError(
        "this is no intact GGUF file", where=str(path), got=got, expected=expected, fix=AGAIN
    )


def open_gguf(path: Path) -> Container:
    """Read the header; tensors stay where they are."""
    try:
        data: Any = np.memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise damaged(path, str(error).splitlines()[0][:200], "a file that can be read") from error
    header = Header(path, data)
    if header.bytes(4) != MAGIC or header.number("I") not in VERSIONS:
        raise damaged(
            path, "another version, or order of bytes", f"version {' or '.join(map(str, VERSIONS))}"
        )
    tensors, entries = header.number("Q"), header.number("Q")
    metadata = {header.text(): header.value(header.number("I")) for _ in range(entries)}
    told = [(header.text(), header.tensor()) for _ in range(tensors)]
    step = metadata.get(ALIGNMENT, 32)
    if type(step) is not int or step <= 0:
        raise damaged(path, f"{ALIGNMENT} {step!r}"[:200], "a number above 0")
    begin, prefix = -(-header.at // step) * step, prefix_of([name for name, _ in told])
    places: dict[str, Place] = {}
    for name, (kind, shape, offset) in told:
        if name in places:
            raise damaged(path, f"tensor '{shown(name)}' twice", "names of their own")
        if name.startswith(prefix):
            places[name] = place_of(path, name, kind, shape, begin + offset)
    for name, place in places.items():
        if place.begin + place.bytes > len(data):
            end = f"tensor '{shown(name)}' up to byte {place.begin + place.bytes}"
            raise damaged(path, f"{len(data)} bytes", end)
        places[name] = replace(place, shape=shape_of(path, name, place.shape, metadata))
    listed = {name.removeprefix(prefix): Entry(place.name, place.shape) for name, place in places.items()}
    words = {key: str(value) for key, value in metadata.items() if not isinstance(value, list)}
    return Container(path, prefix, listed, len(told) - len(places), words, GgufTensors(data, places))


def place_of(path: Path, name: str, kind: int, shape: tuple[int, ...], begin: int) -> Place:
    """How many bytes it takes."""
    if kind in FLOATS and 0 not in shape:
        return Place(kind, shape, begin, math.prod(shape) * FLOATS[kind][1].itemsize)
    if kind not in BLOCKS and kind not in FLOATS:
        known = [*(block.name for block in BLOCKS.values()), *(word for word, _ in FLOATS.values())]
        raise ArtifactError(
            f"tensor '{shown(name)}' is of a type that is not read",
            where=str(path),
            got=UNREAD.get(kind, f"type {kind} of GGUF"),
            expected=", ".join(known),
            fix="fetch a file of another type, or convert the float file",
        )
    block = BLOCKS.get(kind)
    if block is None or not shape or shape[-1] % block.numbers or 0 in shape:
        rows = f"rows of blocks of {block.numbers}" if block else "numbers"
        raise damaged(path, f"tensor '{shown(name)}' of shape {shape}", rows)
    return Place(kind, shape, begin, math.prod(shape) // block.numbers * block.bytes)


def shape_of(path: Path, name: str, shape: tuple[int, ...], metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """As the network has it, where the file has its numbers in rows of another length."""
    said = metadata.get(SHAPE + name)
    if said is None:
        return shape
    sizes = isinstance(said, list) and all(type(size) is int and size > 0 for size in said)
    if not sizes or math.prod(said) != math.prod(shape):
        raise damaged(path, f"{SHAPE}{name} {said!r}"[:200], f"a shape of {math.prod(shape)} numbers")
    return tuple(said)


def read_gguf(file: Container) -> ForeignFile:
    """Sort the tensors of a file: blocks, and plain floats."""
    types, layers, floats = {block.name: block for block in BLOCKS.values()}, {}, []
    for name, entry in file.entries.items():
        if entry.dtype not in types:
            floats.append(name)
            continue
        path, dot, leaf = name.rpartition(".")
        own = GgufLayer(path, entry.shape, types[entry.dtype], dot + leaf)
        layers[name] = own if leaf == "weight" else replace(own, path=name, leaf="")
    return ForeignFile(
        file,
        {layer.path: layer for layer in layers.values()},
        tuple(floats),
        file.metadata.get(ARCHITECTURE, ""),
        "GGUF",
    )
