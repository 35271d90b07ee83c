"""A safetensors file that is written tensor by tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.progress import Progress

WORDS = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
ALIGNED = 8  # the header ends there, filled up with blanks


@dataclass(frozen=True)
class Later:
    """A tensor whose numbers are computed when they are written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    file: Path, tensors: Mapping[str, Later], metadata: Mapping[str, str], progress: Progress
) -> None:
    """The largest types first, so that each tensor begins where its type may begin."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        one = tensors[name]
        begin, end = end, end + one.bytes
        header[name] = {"dtype": WORDS[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in progress.track(order, "writing", len(order)):
            out.write(raw(tensors[name]))


def raw(one: Later) -> bytes:
    """The bytes of a tensor, as the header says that they are."""
    value = one.value().to(one.dtype).reshape(one.shape).contiguous()
    return value.view(-1).view(torch.uint8).numpy().tobytes()
