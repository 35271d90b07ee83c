"""One safetensors file for ComfyUI: `int8_tensorwise` layers with a scale for each row, rotated or not, and floats.

Integers are written as they are. ComfyUI quantizes the inputs of a linear as they come, and knows no quantized convolution.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.hub.exports.at_rest import Network
from stepquant.hub.exports.outlook import (
    Fate,
    Outlook,
    check_float_form,
    dtype_of,
    fates_of_tables,
    float_value,
    left_of_activations,
)
from stepquant.hub.exports.renamed import ORIGINAL, Naming, Piece, layers_in, naming_of, put_together
from stepquant.hub.exports.tensor_file import Later, write_tensors
from stepquant.hub.foreign.markers import INT8, SUFFIX
from stepquant.progress import Progress
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.linear import IntegerLinear

ENDS = ".safetensors"
FLOAT = "float"
AS_THEY_COME = "ComfyUI quantizes each row as it comes"


@dataclass(frozen=True)
class Fused:
    """How the layers of which one weight of the file is made multiply: what has to be the same of all."""

    rotation: int
    float_product: bool


def outlook(network: Network, names: str = ORIGINAL) -> Outlook:
    check_float_form(network, "comfyui")
    naming = naming_of(network, names)
    reasons = {path: why_float(network, path, layer) for path, layer in network.layers.items()}
    for name, pieces in naming.pieces.items():
        paths = layers_in(network, name, pieces)
        if paths and fused(network, reasons, pieces) is None:
            for path in paths:
                reasons[path] = (
                    reasons[path] or f"it is part of '{name}', whose other parts are multiplied differently"
                )
    fates = tuple(Fate(path, FLOAT if why else INT8, why) for path, why in reasons.items())
    return Outlook(
        fates + fates_of_tables(network),
        left_of_activations(network, AS_THEY_COME),
        notes_on(network, naming, names),
    )


def notes_on(network: Network, naming: Naming, names: str) -> tuple[str, ...]:
    if naming.original or names != ORIGINAL:
        return ()
    return (f"the original names of {network.kind} are not known: tensors have those of diffusers",)


def why_float(network: Network, path: str, layer: IntegerLayer) -> str:
    """Why ComfyUI cannot multiply by the layer's integers; empty if it can."""
    spec = layer.spec
    if not isinstance(layer, IntegerLinear):
        return "ComfyUI has no quantized convolution"
    if path.rpartition(".")[0] in network.split:
        return "the halves of the layer have scales of their own, and ComfyUI has one for a row"
    if spec.weight.granularity == "group":
        return "ComfyUI has one scale for a row, and none for groups within it"
    if spec.rank or spec.balanced or spec.offset:
        return "ComfyUI has nothing beside the integers: no branch, no factors of inputs, and no offsets"
    if not layer.fits_signed_bytes():
        return "weights minus their zero point need more than a signed byte"
    return ""


def fused(network: Network, reasons: Mapping[str, str], pieces: tuple[Piece, ...]) -> Fused | None:
    """How a weight of the file is multiplied in integers; None where it is a float."""
    found = set()
    for piece in pieces:
        path = piece.name.removesuffix(".weight")
        if path not in network.layers or reasons[path]:
            return None
        spec = network.layers[path].spec
        found.add(Fused(spec.rotation, spec.input is None))
    return found.pop() if len(found) == 1 else None


def write(network: Network, seen: Outlook, file: Path, progress: Progress, names: str = ORIGINAL) -> None:
    naming = naming_of(network, names)
    reasons = {fate.path: fate.reason for fate in seen.fates}
    tensors: dict[str, Later] = {}
    for name, pieces in naming.pieces.items():
        how = fused(network, reasons, pieces) if layers_in(network, name, pieces) else None
        if how is None:
            dtype = reduce(torch.promote_types, (dtype_of(network, one.name) for one in pieces))
            value = put_together(pieces, lambda one: float_value(network, one))
            tensors[name] = Later(dtype, naming.shapes[name], value)
        else:
            tensors |= integers(network, name.removesuffix(".weight"), pieces, naming.shapes[name], how)
    write_tensors(file, tensors, {"format": "pt"}, progress)


def integers(
    network: Network, path: str, pieces: tuple[Piece, ...], shape: tuple[int, ...], how: Fused
) -> dict[str, Later]:
    """Codes, scales and marker of one linear of the file."""

    def layer(name: str) -> IntegerLayer:
        return network.layers[name.removesuffix(".weight")]

    def scales(name: str) -> Tensor:
        own = layer(name)
        return own.weight_scale.expand(own.weight_shape[0])[:, None]

    said: dict[str, Any] = {"format": INT8}
    said |= {"convrot": True, "convrot_groupsize": how.rotation} if how.rotation else {}
    said |= {"full_precision_matrix_mult": True} if how.float_product else {}
    marker = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    return {
        f"{path}.weight": Later(torch.int8, shape, put_together(pieces, lambda n: layer(n).signed_bytes())),
        f"{path}.weight_scale": Later(torch.float32, (shape[0], 1), put_together(pieces, scales)),
        f"{path}{SUFFIX}": Later(torch.uint8, tuple(marker.shape), lambda: marker),
    }
