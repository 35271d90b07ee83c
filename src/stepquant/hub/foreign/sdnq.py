"""Folders of diffusers whose weights SDNQ packed: integers of 8 or 4 bits, in rows or groups, with a float zero point or none.

A number is code * scale + zero_point. Codes of 4 bits lie two in a byte, the first in its lower half, in one row for a weight;
signed ones have 8 added. Where inputs are quantized as they come, weights lie transposed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.core.policy import RUNTIME, policy_of
from stepquant.core.rotation import is_group, rotate
from stepquant.errors import ArtifactError
from stepquant.hub.foreign.container import FLOATS, Container, open_folder
from stepquant.hub.foreign.network import ForeignFile, ForeignLayer
from stepquant.hub.foreign.rows import Rows

CONFIG = "quantization_config"
TYPES = ("int8", "uint8", "int4", "uint4")
# What changes the numbers of a layer in ways that are not read, unless it has this value or none.
UNREAD = {
    "scale_dtype": None,
    "zero_point_dtype": None,
    "use_codebook": False,
    "use_codebook_scale": False,
    "use_quantized_matmul_conv": False,
    "is_training": False,
}
# How it came about, and how SDNQ is to compute with it.
KNOWN = (
    "quant_method", "weights_dtype", "modules_dtype_dict", "modules_quant_config", "use_svd", "use_hadamard", "hadamard_group_size",
    "use_quantized_matmul", "quantized_matmul_dtype", "group_size", "svd_rank", "svd_steps", "codebook_steps", "dynamic_loss_threshold",
    "use_dynamic_quantization", "use_static_quantization", "use_stochastic_rounding", "use_grad_ckpt", "quant_conv", "quant_embedding",
    "dequantize_fp32", "non_blocking", "add_skip_keys", "minimum_allowed_numel", "minimum_allowed_channel_size", "modules_to_not_convert",
    "modules_to_not_use_matmul", "quantization_device", "return_device", "is_integer", "is_unsigned", "sdnq_version",
)  # fmt: skip
PER_MODULE = ("modules_dtype_dict", "modules_quant_config")
WHERE = (
    "quantization_device",
    "return_device",
    "non_blocking",
    "group_size",
)  # of a module's own settings: where SDNQ computes, and what the shapes of its tensors say too
INTEGERS = {"I8": "int8", "U8": "uint8"}
BRANCH = ("svd_down", "svd_up")
OWN = ("weight", "scale", "zero_point", *BRANCH)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SdnqLayer(ForeignLayer):
    """A layer by what the header says of its tensors."""

    type: str
    scales: tuple[int, ...]  # their shape, with 1 over what shares one
    codes: tuple[int, ...]  # the shape of codes that lie beside their scales
    transposed: bool
    group: int  # of rotation
    rank: int  # of the branch beside the integers
    by_tap: bool = False  # whether scales differ within a row in an order that is not that of its numbers

    @property
    def format(self) -> str:
        return self.type

    @property
    def rotation(self) -> int:
        return self.group

    @property
    def dynamic(self) -> bool:
        return self.transposed and self.type == "int8"

    @property
    def shared(self) -> str:
        if len(self.shape) > 2:
            return "tap" if self.by_tap else "row"
        groups = math.prod(self.scales) // self.shape[0]
        return {0: "tensor", 1: "row"}.get(groups, f"{math.prod(self.shape[1:]) // max(groups, 1)} inputs")

    @property
    def why_float(self) -> str:
        return "a convolution has a scale for each of its taps" if self.by_tap else ""

    def rows(self, file: Container) -> Rows:
        outputs = self.shape[0]
        scales, offsets = (self.numbers(file, leaf, outputs) for leaf in ("scale", "zero_point"))
        assert scales is not None
        signed = not self.type.startswith("u")
        return Rows(int(self.type[-1]), signed, self.integers(file).reshape(outputs, -1), scales, offsets)

    def floats(self, file: Container) -> Tensor:
        scale, offset = (self.read(file, leaf) for leaf in ("scale", "zero_point"))
        assert scale is not None
        values = self.integers(file).float() * scale.float()
        values = (values if offset is None else values + offset.float()).reshape(self.shape)
        values = rotate(values, self.group) if self.group else values
        beside = self.branch(file)
        return values if beside is None else values + beside[1] @ beside[0]

    def branch(self, file: Container) -> tuple[Tensor, Tensor] | None:
        if not self.rank:
            return None
        down, up = (self.read(file, leaf) for leaf in BRANCH)
        assert down is not None
        assert up is not None
        return down.float(), up.float()

    def read(self, file: Container, leaf: str) -> Tensor | None:
        name = f"{self.path}.{leaf}"
        if name not in file.entries:
            return None
        value = file.read(name)
        return value.T if self.transposed else value

    def numbers(self, file: Container, leaf: str, outputs: int) -> Tensor | None:
        """(outputs, groups) of what there is one for each group."""
        value = self.read(file, leaf)
        if value is None:
            return None
        groups = value.float().reshape(self.scales[0], -1)
        return (groups[:, :1] if len(self.shape) > 2 else groups).expand(outputs, -1)

    def integers(self, file: Container) -> Tensor:
        """In the shape in which they lie beside their scales."""
        raw = self.read(file, "weight")
        assert raw is not None
        if self.type.endswith("4"):
            raw = torch.stack([raw & 15, raw >> 4], -1)
            raw = raw if self.type == "uint4" else raw.to(torch.int8) - 8
        return raw.reshape(self.codes)


def read_sdnq(folder: Path) -> ForeignFile:
    """Sort the tensors of a folder; each one is of a layer, a plain float, or an error."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config, file = settings.pop(CONFIG), open_folder(folder)
    check_config(config, file)
    paths = [
        name.removesuffix(".weight")
        for name, entry in file.entries.items()
        if name.endswith(".weight") and entry.dtype in INTEGERS
    ]
    layers = {path: layer_of(file, path, config) for path in sorted(paths)}
    floats = []
    for name, entry in file.entries.items():
        path, _, leaf = name.rpartition(".")
        if path in layers and leaf in OWN:
            continue
        if entry.dtype not in FLOATS:
            raise refused(
                f"tensor '{name}' belongs to no layer",
                file,
                f"{entry.dtype} {entry.shape}",
                "a float, or codes of a weight",
            )
        floats.append(name)
    version = str(config.get("sdnq_version", ""))
    return ForeignFile(file, layers, tuple(floats), version, "SDNQ", settings, policy_of(config, CONFIG))


def check_config(config: Mapping[str, Any], file: Container) -> None:
    """Nothing in it changes the numbers in ways that are not read."""
    if odd := next(unread(config), None):
        word, value = odd
        raise refused(
            f"'{word}' of its {CONFIG} is not read",
            file,
            f"{word} {value!r}"[:120],
            f"layers of {', '.join(TYPES)}",
        )


def unread(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    known = (*KNOWN, *UNREAD, RUNTIME)
    yield from ((word, config[word]) for word in config if config[word] and word not in known)
    yield from (
        (word, config[word]) for word, usual in UNREAD.items() if config.get(word) not in (usual, None)
    )
    for word in PER_MODULE:
        if not isinstance(config.get(word) or {}, Mapping):
            yield word, config[word]
    types = [config.get("weights_dtype"), *(config.get("modules_dtype_dict") or ())]
    yield from (("weights_dtype", kind) for kind in types if kind not in TYPES)
    for said in (config.get("modules_quant_config") or {}).values():
        if not isinstance(said, Mapping) or set(said) - set(WHERE):
            yield "modules_quant_config", said
    if config.get("use_svd") and config.get("use_hadamard"):
        yield "use_svd", "beside use_hadamard"


def layer_of(file: Container, path: str, config: Mapping[str, Any]) -> SdnqLayer:
    """What the header says of the layer's tensors fits together."""
    weight, scale, offset = (file.entries.get(f"{path}.{leaf}") for leaf in ("weight", "scale", "zero_point"))
    assert weight is not None
    if scale is None or scale.dtype not in FLOATS:
        raise refused(f"tensor '{path}.scale' is missing", file, f"codes in '{path}.weight'", "their scales")
    if offset is not None and (offset.dtype not in FLOATS or offset.shape != scale.shape):
        raise refused(f"tensor '{path}.zero_point' does not fit its scales", file, offset.shape, scale.shape)
    packed = weight.dtype == "U8" and len(weight.shape) == 1
    kind = ("uint4" if offset else "int4") if packed else INTEGERS[weight.dtype]
    transposed = len(weight.shape) == 2 and scale.shape == (1, weight.shape[1]) != (1, 1)
    turn = -1 if transposed else 1
    codes = codes_beside(weight.shape[::turn], scale.shape[::turn], packed)
    told = kind in (config["weights_dtype"], *(config.get("modules_dtype_dict") or ()))
    # A single scale does not tell whether the weight lies transposed.
    unclear = math.prod(scale.shape) == 1 and bool(config.get("use_quantized_matmul"))
    if codes is None or not told or unclear:
        raise refused(
            f"tensor '{path}.weight' does not fit its scales",
            file,
            f"{weight.dtype} {weight.shape} and {scale.shape}",
            "rows or groups, each with a scale",
        )
    grouped = len(scale.shape) > 2 and scale.shape[1] > 1
    shape = (codes[0], codes[1] * codes[2], *codes[3:]) if grouped else codes
    group = config.get("hadamard_group_size", 256) if config.get("use_hadamard") else 0
    if group and (type(group) is not int or not is_group(group) or len(shape) != 2 or shape[1] % group):
        raise refused(
            f"tensor '{path}.weight' was rotated in groups that are not read",
            file,
            f"groups of {group!r} in {shape}",
            "a power of four that divides the inputs of a linear",
        )
    rank, tap = rank_of(file, path, shape, turn), len(shape) > 2 and differs_within_rows(file, path)
    return SdnqLayer(path, shape, kind, scale.shape[::turn], codes, transposed, group, rank, tap)


def differs_within_rows(file: Container, path: str) -> bool:
    """Whether a convolution has several scales, or zero points, in a row."""
    names = [f"{path}.{leaf}" for leaf in ("scale", "zero_point")]
    rows = [file.read(name).float().flatten(1) for name in names if name in file.entries]
    return any(bool((row != row[:, :1]).any()) for row in rows)


def codes_beside(weight: Shape, scale: Shape, packed: bool) -> Shape | None:
    """The shape of codes in that of scales: one dimension, over which scales are shared, is longer. None: there is none."""
    if packed:
        along = next((i for i in range(1, len(scale)) if scale[i] == 1), 0)
        numbers, scales = 2 * weight[0], math.prod(scale)
        if not along or numbers % scales or numbers == 0:
            return None
        return (*scale[:along], numbers // scales, *scale[along + 1 :])
    alike = len(weight) == len(scale) > 1 and all(own in (1, size) for own, size in zip(scale, weight))
    return weight if alike and 0 not in weight else None


def rank_of(file: Container, path: str, shape: Shape, turn: int) -> int:
    """Of the branch beside the integers; 0: there is none."""
    down, up = (file.entries.get(f"{path}.{leaf}") for leaf in BRANCH)
    if down is None and up is None:
        return 0
    shapes = [None if side is None else side.shape[::turn] for side in (down, up)]
    rank = 0 if shapes[0] is None else shapes[0][0]
    if len(shape) != 2 or shapes != [(rank, shape[1]), (shape[0], rank)]:
        raise refused(
            f"tensor '{path}.{BRANCH[0]}' does not fit its layer",
            file,
            shapes,
            f"sides of a branch beside {shape}",
        )
    return rank


def refused(what: str, file: Container, got: object, expected: object) -> ArtifactError:
    return ArtifactError(
        what,
        where=str(file.path),
        got=got,
        expected=expected,
        fix="fetch the folder again, or another one of the network",
    )
