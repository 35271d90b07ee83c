"""A folder of diffusers whose weights SDNQ dequantizes: integers of 8 or 4 bits with a scale for each row, or group within it.

Codes of 4 bits lie two in a byte, the first in its lower half; signed ones have 8 added, others a float zero point beside the scale.
Every layer is told of one by one: what SDNQ would leave in float by rules of its own is written in integers where these are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.hub.exports.at_rest import WEIGHTS, Network
from stepquant.hub.exports.outlook import (
    Fate,
    Outlook,
    check_float_form,
    dtype_of,
    fates_of_tables,
    float_value,
    left_of_activations,
)
from stepquant.hub.exports.tensor_file import Later, write_tensors
from stepquant.progress import Progress
from stepquant.runtime.layers.floating import float_kind
from stepquant.runtime.layers.layer import IntegerLayer

ENDS = ""  # a folder
INT8, INT4, UINT4, FLOAT = "int8", "int4", "uint4", "float"
VERSION = "0.2.8"  # whose settings these are
SETTINGS = {
    "quant_method": "sdnq",
    "sdnq_version": VERSION,
    "group_size": -1,  # a scale for each row, where a layer is not told otherwise
    "use_quantized_matmul": False,
    "dequantize_fp32": True,
    "add_skip_keys": False,
    "minimum_allowed_numel": 1,
    "minimum_allowed_channel_size": 1,
}
IN_FLOAT = "weights are multiplied in float"


def outlook(network: Network) -> Outlook:
    check_float_form(network, "sdnq")
    reasons = {path: why_float(network, path, layer) for path, layer in network.layers.items()}
    fates = tuple(
        Fate(path, FLOAT if why else kind_of(network.layers[path]), why) for path, why in reasons.items()
    )
    return Outlook(fates + fates_of_tables(network), left_of_activations(network, IN_FLOAT))


def why_float(network: Network, path: str, layer: IntegerLayer) -> str:
    """Why the folder cannot carry the layer's integers; empty if it can."""
    spec = layer.spec
    if float_kind(layer) not in (nn.Linear, nn.Conv2d):
        return "convolutions over one or three dimensions are not written"
    if path.rpartition(".")[0] in network.split:
        return "the halves of the layer have scales of their own"
    if spec.weight.granularity == "group" and len(layer.weight_shape) > 2:
        return "groups within the rows of a convolution are not written"
    if spec.rank or spec.balanced or spec.rotation or spec.offset:
        return (
            "only scales are written beside the integers: no rotation, branch, factors of inputs or offsets"
        )
    if kind_of(layer) == INT8 and not layer.fits_signed_bytes():
        return "weights minus their zero point need more than a signed byte"
    return ""


def kind_of(layer: IntegerLayer) -> str:
    """The type in which a layer's integers are written."""
    if layer.spec.weight.width > 4 or layer.weight_shape.numel() % 2:
        return INT8
    least, most = torch.sub(*layer.rows()).aminmax()
    return INT4 if least >= -8 and most <= 7 else UINT4


def write(network: Network, seen: Outlook, file: Path, progress: Progress) -> None:
    kept = {fate.path: fate.becomes for fate in seen.fates if fate.kept}
    tensors: dict[str, Later] = {}
    for name, shape in network.shapes.items():
        path, _, leaf = name.rpartition(".")
        if path in kept and leaf == "weight":
            layer = network.layers[path]
            tensors |= integers(path, layer, kept[path])
        else:
            tensors[name] = Later(dtype_of(network, name), shape, value_of(network, name))
    file.mkdir()
    write_tensors(file / WEIGHTS, tensors, {"format": "pt"}, progress)
    (file / "config.json").write_text(
        json.dumps(settings_of(network, kept), indent=2) + "\n", encoding="utf-8"
    )


def integers(path: str, layer: IntegerLayer, kind: str) -> dict[str, Later]:
    """SDNQ shares scales over input channels alone: those of a row are said again at every tap."""
    shape, groups = tuple(layer.weight_shape), groups_in(layer)
    shape = (shape[0], groups, shape[1] // groups) if groups > 1 else shape
    sides = (*shape[:-1], 1) if groups > 1 else (shape[0], 1, *shape[2:])

    def shared(values: Tensor) -> Tensor:
        return values.reshape(-1, groups, *[1] * (len(sides) - 2)).expand(sides)

    def zero_points() -> Tensor:
        return (layer.spec.weight.qmin - layer.rows()[1].flatten()).float() * layer.weight_scale

    made = {f"{path}.scale": Later(torch.float32, sides, lambda: shared(layer.weight_scale))}
    if kind == UINT4:
        made[f"{path}.zero_point"] = Later(torch.float32, sides, lambda: shared(zero_points()))
    if kind == INT8:
        return made | {f"{path}.weight": Later(torch.int8, shape, layer.signed_bytes)}
    halves = (layer.weight_shape.numel() // 2,)
    return made | {f"{path}.weight": Later(torch.uint8, halves, lambda: two_in_a_byte(layer, kind))}


def groups_in(layer: IntegerLayer) -> int:
    """How many scales a row has."""
    return max(1, layer.weight_scale.numel() // layer.weight_shape[0])


def two_in_a_byte(layer: IntegerLayer, kind: str) -> Tensor:
    codes, zeros = layer.rows()
    codes = codes - zeros + 8 if kind == INT4 else codes - layer.spec.weight.qmin
    low, high = codes.to(torch.uint8).reshape(-1, 2).unbind(1)
    return low | high << 4


def settings_of(network: Network, kept: Mapping[str, str]) -> dict[str, Any]:
    """The network's own settings, and those of SDNQ, which name every layer that stays float or has another type than most."""
    floats = [
        name
        for name, shape in network.shapes.items()
        if name.endswith(".weight") and len(shape) > 1 and name.removesuffix(".weight") not in kept
    ]
    convolutions = any(len(network.layers[path].weight_shape) > 2 for path in kept)
    (usual, _), *others = Counter(kept.values()).most_common() or [(INT8, 0)]
    told = {"weights_dtype": usual, "quant_conv": convolutions, "modules_to_not_convert": floats}
    other = {kind: [f"{path}.weight" for path in kept if kept[path] == kind] for kind, _ in others}
    groups = {
        f"{path}.weight": {
            "group_size": network.layers[path].weight_shape[1] // groups_in(network.layers[path])
        }
        for path in kept
        if groups_in(network.layers[path]) > 1
    }
    told |= {"modules_dtype_dict": other} if other else {}
    told |= {"modules_quant_config": groups} if groups else {}
    return {**network.settings, "quantization_config": SETTINGS | told}


def value_of(network: Network, name: str) -> Callable[[], Tensor]:
    return lambda: float_value(network, name)
