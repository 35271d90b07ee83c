"""Files as other programs write them, from the published maths alone, and what they stand for.

Rotation is a product with the matrix, in float64, and original names come from a table for each network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)


def hadamard(size: int) -> Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.kron(made, H4)
    return made / size**0.5


def turned(weight: Tensor, group: int) -> Tensor:
    rows = weight.double().reshape(len(weight), -1, group)
    return (rows @ hadamard(group).T).reshape(weight.shape)


@dataclass(frozen=True)
class Packed:
    """One layer: tensors, what its marker says, and the float weight that both stand for."""

    tensors: Mapping[str, Tensor]
    said: Mapping[str, Any]
    weight: Tensor


def int8(weight: Tensor, group: int = 0, by_row: bool = True, lowest: int = -128) -> Packed:
    rotated = turned(weight, group) if group else weight.double()
    largest = rotated.abs().amax(-1, keepdim=True) if by_row else rotated.abs().max()
    scale = (largest / 127).clamp(min=1e-30).float()
    q = (rotated / scale.double()).round().clamp(lowest, 127).to(torch.int8)
    back = q.float() * scale
    back = turned(back, group).float() if group else back
    said = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    return Packed({"weight": q, "weight_scale": scale}, said, back)


def nibbles(codes: Tensor) -> Tensor:
    """Two in a byte, the first in its lower half; in two's complement where they have a sign."""
    low, high = (codes.long().reshape(len(codes), -1, 2) & 15).unbind(-1)
    return (low | high << 4).to(torch.uint8).view(torch.int8)


def w4a4(weight: Tensor, group: int = 16) -> Packed:
    rotated = turned(weight, group)
    scale = (rotated.abs().amax(-1, keepdim=True) / 7).float()
    q = (rotated / scale.double()).round().clamp(-7, 7)
    said = {"format": "convrot_w4a4", "convrot_groupsize": group}
    return Packed(
        {"weight": nibbles(q), "weight_scale": scale[:, 0]}, said, turned(q.float() * scale, group).float()
    )


def w4a8(weight: Tensor, group: int = 16, table: bool = True, bits: int = 4) -> Packed:
    """Codes of levels that lie closer around zero, or evenly, with a scale for 16 that makes bytes of them."""
    rotated = turned(weight, group)
    scale = (rotated.abs().amax(-1) / 127).float()
    groups = (rotated / scale[:, None].double()).reshape(len(weight), -1, 16)
    even = torch.arange(2**bits, dtype=torch.float32) - 2 ** (bits - 1)
    levels = torch.linspace(-1, 1, 16).pow(3) if table else even
    relative = (groups.abs().amax(-1) / levels.abs().max()).to(torch.float8_e4m3fn)
    near = (groups[..., None] - levels * relative.float()[..., None, None]).abs().argmin(-1)
    codes = near.reshape(weight.shape)
    data = nibbles(codes)
    if bits == 6:
        upper = codes.reshape(len(codes), -1, 4) >> 4
        byte = sum(upper[..., place] << 2 * place for place in range(4))
        data = torch.cat([data, byte.to(torch.uint8).view(torch.int8)], 1)
    q = (levels[near] * relative.float()[..., None]).round().clamp(-127, 127).reshape(weight.shape)
    tensors = {"weight": data, "weight_s_rel": relative, "weight_s_channel": scale}
    tensors |= {"weight_codebook": levels} if table else {}
    said = {"format": "asym_w4a8_int8", "convrot_groupsize": group, "group_size": 16, "convrot": True}
    return Packed(tensors, said, turned(q.float() * scale[:, None], group).float())


def fp8(weight: Tensor) -> Packed:
    scale = (weight.abs().max() / 448).float()
    q = (weight / scale).to(torch.float8_e4m3fn)
    return Packed(
        {"weight": q, "weight_scale": scale},
        {"format": "float8_e4m3fn"},
        (q.float() * scale).bfloat16().float(),
    )


def fast(packed: Packed) -> Packed:
    """In the dialect of INT8-Fast, whose markers name no format."""
    said = {key: value for key, value in packed.said.items() if key != "format"}
    rows = packed.tensors["weight_scale"].numel() > 1
    return Packed(packed.tensors, said | {"per_row": rows}, packed.weight)


@dataclass
class File:
    """What is to be written; tests take from it and change it as they like."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def mark(self, path: str, said: Any) -> None:
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.tensors[f"{path}.comfy_quant"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def write(self, path: Path, prefix: str = "") -> Path:
        made = {prefix + name: value.contiguous() for name, value in self.tensors.items()}
        save_file(made, path, self.metadata or None)
        return path


def file_of(floats: Mapping[str, Tensor], packed: Mapping[str, Packed], table: bool = False) -> File:
    """`floats` with these layers packed; markers beside the layers, or in the metadata."""
    made = File(dict(floats))
    for path, layer in packed.items():
        made.tensors |= {f"{path}.{leaf}": value for leaf, value in layer.tensors.items()}
        if not table:
            made.mark(path, layer.said)
    if table:
        layers = {path: layer.said for path, layer in packed.items()}
        made.metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return made
