"""What diffusers has read of a file before it asks: tensors by name, without the metadata and the path of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepquant.errors import ArtifactError
from stepquant.hub.foreign.blocks import BLOCKS
from stepquant.hub.foreign.comfy import read_file
from stepquant.hub.foreign.container import Container, Entry, prefix_of
from stepquant.hub.foreign.gguf import FLOATS, place_of, read_gguf
from stepquant.hub.foreign.markers import SUFFIX
from stepquant.hub.foreign.network import ForeignFile

FILE = Path("the file given to from_single_file")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Loaded:
    """Answers with the tensors; blocks of GGUF as (blocks, bytes)."""

    tensors: Mapping[str, Tensor]

    def get_tensor(self, name: str) -> Tensor:
        value = self.tensors[name]
        kind, raw = type_of(value), value.detach().as_subclass(Tensor)
        if kind in BLOCKS:
            return raw.reshape(-1, BLOCKS[kind].bytes)
        return raw.view(FLOATS[kind][1]) if kind in FLOATS else raw


def type_of(value: Tensor) -> int | None:
    """The number of the type of GGUF whose bytes these are; None for numbers as torch has them."""
    kind = getattr(value, "quant_type", None)
    return None if kind is None else int(kind)


def is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there are integers that stand for weights."""
    return any(name.endswith(SUFFIX) or type_of(value) in BLOCKS for name, value in tensors.items())


def read_loaded(tensors: Mapping[str, Tensor]) -> ForeignFile:
    """What the tensors hold of a network."""
    if not is_packed(tensors):
        raise ArtifactError(
            "no tensor of this file says that it is packed: what stands in the metadata of a file is not handed on",
            where=str(FILE),
            expected=f"tensors of {SUFFIX} beside the layers, or blocks of GGUF",
            fix="stepquant.load(FILE, config=FOLDER) reads the file itself; float files take StepquantConfig('w8a8-dynamic')",
        )
    prefix = prefix_of(list(tensors))
    entries = {
        name.removeprefix(prefix): entry_of(name, value)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    file = Container(FILE, prefix, entries, len(tensors) - len(entries), {}, Loaded(tensors))
    return read_gguf(file) if any(type_of(one) is not None for one in tensors.values()) else read_file(file)


def entry_of(name: str, value: Tensor) -> Entry:
    kind, shape = type_of(value), tuple(value.shape)
    if kind is None:
        return Entry(DTYPES.get(value.dtype, str(value.dtype)), shape)
    if kind in BLOCKS:
        shape = (*shape[:-1], shape[-1] // BLOCKS[kind].bytes * BLOCKS[kind].numbers)
    elif kind in FLOATS:
        shape = (*shape[:-1], shape[-1] * value.element_size() // FLOATS[kind][1].itemsize)
    return Entry(place_of(FILE, name, kind, shape, 0).name, shape)
