"""Folders as SDNQ writes them, from the published layout alone, and the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.foreign.writer import turned

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Packed:
    """The tensors of one layer, and the float weight that they stand for."""

    tensors: Mapping[str, Tensor]
    weight: Tensor


def packed(kind: str, weight: Tensor, group: int = 0, transposed: bool = False, rotation: int = 0) -> Packed:
    """Rows, or groups of inputs, from their least to their most; symmetric where codes have a sign."""
    values = turned(weight, rotation) if rotation else weight.double()
    values = values.reshape(len(weight), -1, group) if group else values
    top, signed = 2 ** int(kind[-1]) - 1, not kind.startswith("u")
    if signed:
        scale, zero = values.abs().amax(-1, keepdim=True) / (top // 2), None
    else:
        zero = values.amin(-1, keepdim=True).float()
        scale = (values.amax(-1, keepdim=True) - zero) / top
    scale = scale.float()
    codes = ((values - (0 if zero is None else zero)) / scale).round()
    codes = codes.clamp(-(top // 2) - 1, top // 2) if signed else codes.clamp(0, top)
    back = (codes.float() * scale + (0 if zero is None else zero)).reshape(weight.shape)
    back = turned(back, rotation).float() if rotation else back
    data = codes.to(torch.int8 if signed else torch.uint8)
    if kind.endswith("4"):
        stored = (codes + 8 * signed).to(torch.uint8).reshape(-1, 2)
        data = stored[:, 0] | stored[:, 1] << 4
    made = {"weight": data, "scale": scale} | ({} if zero is None else {"zero_point": zero})
    if transposed:
        made = {leaf: value.T for leaf, value in made.items()}
    return Packed({leaf: value.contiguous() for leaf, value in made.items()}, back)


def with_branch(kind: str, weight: Tensor, rank: int, transposed: bool = False) -> Packed:
    """Integers of what a few directions leave."""
    u, s, v = torch.linalg.svd(weight)
    up, down = (u[:, :rank] * s[:rank]).half().float(), v[:rank].half().float()
    rest = packed(kind, weight - up @ down, transposed=transposed)
    sides = {"svd_up": up, "svd_down": down}
    sides = {leaf: (side.T if transposed else side).contiguous() for leaf, side in sides.items()}
    return Packed({**rest.tensors, **sides}, rest.weight + up @ down)


@dataclass
class Folder:
    """What is to be written; tests take from it and change it as they like."""

    settings: dict[str, Any]
    config: dict[str, Any]
    tensors: Leaves
    floats: Leaves = field(default_factory=dict)  # that it stands for, by the names of the network

    def write(self, path: Path, shards: int = 1) -> Path:
        path.mkdir(exist_ok=True)
        text = json.dumps(self.settings | {"quantization_config": self.config})
        (path / "config.json").write_text(text)
        names = sorted(self.tensors)
        for index in range(shards):
            part = f"-{index + 1:05}-of-{shards:05}" if shards > 1 else ""
            own = {name: self.tensors[name] for name in names[index::shards]}
            save_file(own, path / f"diffusion_pytorch_model{part}.safetensors")
        return path


def folder_of(model: Any, kind: Callable[[Tensor], Packed], **config: Any) -> Folder:
    """Every linear of 32 inputs and more packed, and all else in float."""
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    settings = {key: value for key, value in model.config.items() if not key.startswith("_")}
    made = Folder(
        {"_class_name": type(model).__name__, **settings},
        {"quant_method": "sdnq", "sdnq_version": "0.2.8", "group_size": 0, **config},
        dict(own),
        own,
    )
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features % 32 == 0:
            one = kind(made.tensors.pop(f"{path}.weight"))
            made.tensors |= {f"{path}.{leaf}": value for leaf, value in one.tensors.items()}
            made.floats[f"{path}.weight"] = one.weight
    return made
