"""One GGUF file: weights in blocks of 32, each with a scale of sixteen bits, which is that of the row or group it lies in.

Integers are written as they are, in `Q8_0`, or `Q4_0` and `Q4_1` where they have four bits; only scales are rounded. Programs
that read such files multiply in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from stepquant.hub.exports.at_rest import Network
from stepquant.hub.exports.gguf_file import BLOCK, F16, F32, Q4_0, Q4_1, Q8_0, Block, Kind, write_gguf
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
from stepquant.models.originals import architecture_of
from stepquant.progress import Progress
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.linear import IntegerLinear

ENDS = ".gguf"
FEW = 1024  # tensors of so many numbers are kept in float32, as other writers of such files do
IN_FLOAT = "weights of GGUF are multiplied in float"
MOST_ERROR = 2.0**-9  # of a scale in sixteen bits: of 127 steps of such a scale, a quarter of one


def outlook(network: Network, names: str = ORIGINAL) -> Outlook:
    check_float_form(network, "gguf")
    naming = naming_of(network, names)
    reasons = {path: why_float(network, path, layer) for path, layer in network.layers.items()}
    becomes = dict.fromkeys(reasons, F16.name)
    for name, pieces in naming.pieces.items():
        kind = kind_of(network, reasons, name, pieces)
        for path in layers_in(network, name, pieces):
            if kind is None and not reasons[path]:
                reasons[path] = f"it is part of '{name}', of which other parts are floats"
            becomes[path] = (kind or float_kind(network, name, pieces, naming)).name
    fates = tuple(Fate(path, becomes[path], why) for path, why in reasons.items())
    return Outlook(
        fates + fates_of_tables(network), left_of_activations(network, IN_FLOAT), notes_on(network, naming)
    )


def notes_on(network: Network, naming: Naming) -> tuple[str, ...]:
    notes = []
    if architecture_of(network.kind, network.model.config) is None or not naming.original:
        notes.append(f"tensors of {network.kind} have the names of diffusers, in which ggml knows no network")
    notes += [
        f"'{name}' has {len(shape)} dimensions, and programs on ggml read 4 at most"
        for name, shape in naming.shapes.items()
        if len(shape) > 4
    ]
    return tuple(notes)


def why_float(network: Network, path: str, layer: IntegerLayer) -> str:
    """Why no blocks can carry the layer's integers; empty if they can."""
    spec, group = layer.spec, layer.weight_shape.numel() // layer.weight_scale.numel()
    if not isinstance(layer, IntegerLinear):
        return f"the rows of a convolution are no blocks of {BLOCK}"
    if layer.in_features % BLOCK or (spec.weight.granularity == "group" and group % BLOCK):
        return f"blocks of {BLOCK} do not fill {'groups' if not layer.in_features % BLOCK else 'rows'}"
    if path.rpartition(".")[0] in network.split:
        return "the halves of the layer have scales of their own"
    if spec.rank or spec.balanced or spec.rotation or spec.offset:
        return (
            "only scales are written beside the integers: no rotation, branch, factors of inputs or offsets"
        )
    if spec.weight.width > 4 and not layer.fits_signed_bytes():
        return "weights minus their zero point need more than a signed byte"
    errors = layer.weight_scale.half().float() / layer.weight_scale - 1
    if not bool(errors.abs().max() <= MOST_ERROR):
        return "its scales are no numbers of sixteen bits"
    return ""


def block_of(layer: IntegerLayer) -> Block:
    """The smallest blocks that hold the layer's integers."""
    if layer.spec.weight.width > 4:
        return Q8_0
    centred = layer.signed_bytes()
    return Q4_0 if int(centred.min()) >= -8 and int(centred.max()) <= 7 else Q4_1


def kind_of(
    network: Network, reasons: Mapping[str, str], name: str, pieces: tuple[Piece, ...]
) -> Block | None:
    """The blocks that hold a tensor of the file; None where it is a float. Of several, those that hold the others too."""
    paths = layers_in(network, name, pieces)
    if not paths or len(paths) < len(pieces) or any(reasons[path] for path in paths):
        return None
    found = {block_of(network.layers[path]) for path in paths}
    return found.pop() if len(found) == 1 else Q8_0


def float_kind(network: Network, name: str, pieces: tuple[Piece, ...], naming: Naming) -> Kind:
    shape = naming.shapes[name]
    count = torch.Size(shape).numel()
    halves = all(dtype_of(network, one.name) == torch.float16 for one in pieces)
    return F16 if halves and len(shape) > 1 and count > FEW else F32


def write(network: Network, seen: Outlook, file: Path, progress: Progress, names: str = ORIGINAL) -> None:
    naming = naming_of(network, names)
    reasons = {fate.path: fate.reason for fate in seen.fates}
    tensors: dict[str, tuple[Kind, tuple[int, ...], Callable[[], Tensor]]] = {}
    for name, pieces in naming.pieces.items():
        block = kind_of(network, reasons, name, pieces)
        kind = block or float_kind(network, name, pieces, naming)
        tensors[name] = kind, naming.shapes[name], values_of(network, pieces, kind)
    architecture = architecture_of(network.kind, network.model.config) if naming.original else None
    write_gguf(file, tensors, architecture, progress)


def values_of(network: Network, pieces: tuple[Piece, ...], kind: Kind) -> Callable[[], Tensor]:
    """The rows of a tensor as they are written."""
    if isinstance(kind, Block):
        return put_together(pieces, lambda name: rows(network.layers[name.removesuffix(".weight")], kind))
    return put_together(pieces, lambda name: float_value(network, name).to(kind.dtype))


def rows(layer: IntegerLayer, kind: Block) -> Tensor:
    """The bytes of a layer's weight, row by row."""
    integers, zero_points = layer.rows()
    blocks = integers.reshape(-1, BLOCK)
    each = len(blocks) // len(integers)
    scales, zero_points = (
        x.reshape(-1, 1).repeat_interleave(each, 0) for x in (layer.weight_scale, zero_points)
    )
    return kind.pack(blocks, scales.half(), zero_points).reshape(layer.weight_shape[0], -1)
