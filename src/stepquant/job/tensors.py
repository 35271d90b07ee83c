"""Files of safetensors, one tensor at a time: neither in memory nor mapped as a whole."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor, nn

from stepquant.core.mapped import view
from stepquant.errors import ModelError

# In the order in which safetensors itself puts them into a file.
KINDS = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {kind: name for name, kind in KINDS.items()}
LENGTH = struct.Struct("<Q")  # of the header, in front of it
FILE = "diffusion_pytorch_model.safetensors"
OF_TEXTS = "model.safetensors"  # as transformers calls it


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie."""

    file: Path
    kind: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def among(self, data: Any) -> Tensor:
        """The tensor in the bytes of its file."""
        return view(data, self.kind, self.shape, self.begin)

    def read(self) -> Tensor:
        value = torch.empty(self.shape, dtype=self.kind)
        with self.file.open("rb") as file:
            file.seek(self.begin)
            if file.readinto(bytes_of(value)) != value.nbytes:
                raise damaged(self.file, "it ends early")
        return value


def bytes_of(value: Tensor) -> Any:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data


def damaged(file: Path, how: object) -> ModelError:
    return ModelError(
        "a file of weights is damaged", where=str(file), got=how, fix="fetch or save the model again"
    )


def places_in(file: Path) -> dict[str, Place]:
    """Every tensor of a file, by its name."""
    try:
        with file.open("rb") as opened:
            (length,) = LENGTH.unpack(opened.read(LENGTH.size))
            if length > (size := file.stat().st_size):
                raise damaged(file, f"a header of {length} bytes")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        first, found = LENGTH.size + length, {}
        last = first + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if last > size:  # what is mapped and not there ends the process that reads it
            raise damaged(file, f"{size} bytes, where its header tells of {last}")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            place = Place(file, KINDS[entry["dtype"]], tuple(entry["shape"]), first + begin)
            if begin < 0 or math.prod(place.shape) * place.kind.itemsize != end - begin:
                raise damaged(file, f"{end - begin} bytes for '{name}'")
            found[name] = place
        return found
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(file, error) from error


def is_saved(folder: Path, file: str = FILE) -> bool:
    """Whether a folder has the weights of a network in files that are called so."""
    return (folder / file).is_file() or (folder / f"{file}.index.json").is_file()


def weights_in(folder: Path, file: str = FILE) -> dict[str, Place]:
    """Every tensor of a network, which may lie in several files."""
    index = folder / f"{file}.index.json"
    if not index.is_file():
        return places_in(folder / file)
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(index, error) from error
    return {name: place for one in files for name, place in places_in(folder / one).items()}


def narrow_tables(network: nn.Module, places: Mapping[str, Place]) -> dict[str, torch.dtype]:
    """The types of tables that are saved with a network, where its files have narrower ones: these say all that they hold."""
    saved = network.state_dict()
    tables = {name: saved[name] for name, _ in network.named_buffers() if name in saved and name in places}
    kinds = {name: places[name].kind for name, value in tables.items() if value.is_floating_point()}
    return {
        name: kind
        for name, kind in kinds.items()
        if kind.is_floating_point and kind.itemsize < saved[name].itemsize
    }


class Writer:
    """A file whose tensors come one after the other, in any order; what they will be like is known before."""

    def __init__(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        order, end = list(NAMES), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
            value = tensors[name]
            offsets = [end, end := end + value.nbytes]
            header[name] = {
                "dtype": NAMES[value.dtype],
                "shape": list(value.shape),
                "data_offsets": offsets,
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % LENGTH.size)
        self.header, self.first = header, LENGTH.size + len(text)
        self.file: BinaryIO = file.open("wb")
        self.file.write(LENGTH.pack(len(text)) + text)
        self.file.truncate(self.first + end)

    def put(self, name: str, value: Tensor) -> None:
        entry = self.header[name]
        assert (NAMES[value.dtype], list(value.shape)) == (entry["dtype"], entry["shape"]), name
        self.file.seek(self.first + entry["data_offsets"][0])
        self.file.write(bytes_of(value))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
