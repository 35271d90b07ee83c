"""Cost of one call: traced multiply-accumulates of every layer, and bit operations and bytes by the bits of the grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from stepquant.core.grid import FLOAT_BITS
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.roles import embeddings_in
from stepquant.runtime import coverage as traced
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.embedding import IntegerEmbedding
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.stored import Stored


def count_macs(denoiser: Denoiser, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-accumulates of every layer and attention product in one call, divided by the batch size."""
    batch = samples(denoiser, arguments)
    lines = traced.coverage(denoiser.model, denoiser.there(arguments)).lines
    return {line.path: round(line.macs / batch) for line in lines}


def samples(denoiser: Denoiser, arguments: Mapping[str, Any]) -> int:
    return int(arguments[denoiser.family.x].shape[0])


def coverage(source: Denoiser, quantized: Denoiser, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every layer and product of `quantized`: its grids, its work, and whether it ran in integers in one traced call.

    `source`, the float model, gives the roles of the layers; it is not called.
    """
    roles = source.sites() | embeddings_in(source.model) | dict.fromkeys(source.products(), "product")
    batch = samples(quantized, arguments)
    lines = traced.coverage(quantized.model, quantized.there(arguments)).lines
    rows = []
    for line in sorted(lines, key=lambda line: line.kind):  # layers before products
        role = role_of(roles, line.path)
        module: Any = quantized.model.get_submodule(line.path)
        if line.kind == "product":
            module = getattr(module, "product", None)
        rows.append(
            {"path": line.path, "role": role, "macs": round(line.macs / batch), "bytes": stored_bytes(module)}
            | grids(module)
            | {"kernel": kernel_name(module) if line.integer else "", "integer": line.integer}
            | {"reason": line.reason or ""}
        )
    return rows


def role_of(roles: Mapping[str, str], path: str) -> str:
    """That of a layer; halves of one that reads a concatenation, and branches beside integers, lie below it."""
    return roles[path] if path in roles else role_of(roles, path.rpartition(".")[0])


def stored_bytes(module: nn.Module | None) -> int:
    """Bytes of a layer's own tensors: as packed, or in fp32."""
    if module is None:
        return 0
    if isinstance(module, Stored):
        return sum(value.nbytes for value in module.buffers(recurse=False))
    return sum(FLOAT_BITS // 8 * value.numel() for value in module.parameters())


def grids(module: nn.Module | None) -> dict[str, Any]:
    """The grids of the two operands: weight and input, or probabilities and query."""
    if isinstance(module, IntegerProduct):
        return {"weight": str(module.spec.probabilities), "input": str(module.spec.query)}
    if isinstance(module, IntegerEmbedding):
        return {"weight": str(module.spec.weight), "input": "float"}
    if isinstance(module, IntegerLayer):
        found = {"weight": str(module.spec.weight), "input": str(module.spec.input or "float")}
        return found | ({"rotation": module.spec.rotation} if module.spec.rotation else {})
    return {"weight": "float", "input": "float"}


def kernel_name(module: nn.Module | None) -> str:
    """Which kind of integer kernel runs this module: linear, convolution or attention."""
    if isinstance(module, IntegerLayer):
        return "linear" if len(module.weight_shape) == 2 else "convolution"
    return "attention"


def bits(grid: str) -> int:
    """The width of a grid's integers; 32 for float."""
    digits = "".join(c for c in grid.partition("int")[2].partition("/")[0] if c.isdigit())
    return int(digits) if digits else FLOAT_BITS


def bit_operations(rows: Sequence[Mapping[str, Any]]) -> int:
    """BOPs: weight bits times activation bits times multiply-accumulates, summed over rows of the coverage."""
    return sum(bits(row["weight"]) * bits(row["input"]) * row["macs"] for row in rows)


def cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Work and memory of one call by precision, from rows of the coverage; float counts as 32 bits, as in the survey."""
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((bits(row["weight"]), bits(row["input"])), []).append(row)
    found = [
        {"weight": weight, "input": inputs, "layers": len(group), "macs": sum(row["macs"] for row in group)}
        | {"bops": bit_operations(group), "bytes": sum(row["bytes"] for row in group)}
        for (weight, inputs), group in sorted(groups.items())
    ]
    total = sum(row["macs"] for row in rows)
    return {
        "rows": found,
        "macs": total,
        "bops": bit_operations(rows),
        "float_bops": FLOAT_BITS**2 * total,
        "bytes": sum(row["bytes"] for row in rows),
    }
