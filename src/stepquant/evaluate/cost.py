"""What a denoiser computes: multiply-accumulates by layer, in which precision they ran, and what follows from that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import removing
from stepquant.runtime.blocks.time_rows import Tabled
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.layer import IntegerLayer

FLOAT_BITS = 32
QUERIES, KEYS = ("to_q", "add_q_proj"), ("to_k", "add_k_proj")

FLOAT = {"weight": "float", "input": "float", "kernel": "", "integer": False}
TABLED = "a table holds what it returns for every t"


def layer_macs(layer: nn.Module, out: Tensor) -> int:
    """Multiply-accumulates of one call of a convolution or linear with this output."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return out.numel() * weight[0].numel()


def count_macs(denoiser: Denoiser, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-accumulates an image of every layer and attention product in one call of the float model."""
    found: dict[str, int] = {}
    outputs: dict[str, torch.Size] = {}
    batch = int(arguments[denoiser.family.x].shape[0])
    modules = dict(denoiser.model.named_modules())

    def keep(path: str) -> Any:
        def hook(module: nn.Module, _: Any, out: Tensor) -> None:
            found[path] = found.get(path, 0) + layer_macs(module, out)
            outputs[path] = out.shape

        return hook

    with ExitStack() as stack, torch.no_grad():
        for path in denoiser.sites():
            stack.enter_context(removing(modules[path].register_forward_hook(keep(path))))
        denoiser.predict(arguments)
    found |= {path: product_macs(path, outputs) for path in denoiser.products()}
    return {path: macs // batch for path, macs in found.items()}


def product_macs(path: str, outputs: Mapping[str, torch.Size]) -> int:
    """Both products of one attention, from the shapes (batch, tokens, width) of its queries and keys."""
    queries = [outputs[f"{path}.{name}"] for name in QUERIES if f"{path}.{name}" in outputs]
    keys = [outputs[f"{path}.{name}"] for name in KEYS if f"{path}.{name}" in outputs]
    if not queries or not keys:
        return 0
    asked, offered = (sum(shape[1] for shape in shapes) for shapes in (queries, keys))
    return 2 * queries[0][0] * asked * offered * queries[0][2]


def coverage(source: Denoiser, quantized: Denoiser, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every layer and product: its work, its grids, and whether integers multiplied."""
    macs = count_macs(source, arguments)
    roles = source.sites() | dict.fromkeys(source.products(), "product")
    running = {
        path: module
        for path, module in quantized.model.named_modules()
        if isinstance(module, IntegerLayer | IntegerProduct)
    }
    tabled = {path for path, module in quantized.model.named_modules() if isinstance(module, Tabled)}
    rows = []
    for path, role in roles.items():
        if path in tabled:
            rows.append({"path": path, "role": role, "macs": 0, "bytes": 0} | FLOAT | {"reason": TABLED})
            continue
        halves = {half: running[half] for half in (f"{path}.0", f"{path}.1") if half in running}
        for place, module, share in parts(
            path, running.get(f"{path}.product" if role == "product" else path), halves
        ):
            row = {"path": place, "role": role, "macs": round(macs.get(path, 0) * share)}
            stored = module or (None if role == "product" else source.model.get_submodule(path))
            rows.append(row | {"bytes": stored_bytes(stored)} | describe(module))
    return rows


def stored_bytes(module: nn.Module | None) -> int:
    """Bytes of a layer's own tensors: as packed, or in fp32."""
    if module is None:
        return 0
    if isinstance(module, IntegerLayer | IntegerProduct):
        return sum(value.nbytes for value in module.buffers(recurse=False))
    return sum(FLOAT_BITS // 8 * value.numel() for value in module.parameters())


def parts(
    path: str, module: IntegerLayer | IntegerProduct | None, halves: Mapping[str, Any]
) -> Iterator[tuple[str, IntegerLayer | IntegerProduct | None, float]]:
    """A layer that reads a concatenation may run as two, each with its share of the work."""
    if not halves:
        yield path, module, 1.0
        return
    total = sum(half.weight_shape.numel() for half in halves.values())
    for place, half in halves.items():
        yield place, half, half.weight_shape.numel() / total


def describe(module: IntegerLayer | IntegerProduct | None) -> dict[str, Any]:
    if module is None:
        return FLOAT | {"reason": "the plan keeps it float"}
    module.prepared()
    if isinstance(module, IntegerProduct):
        grids = {"weight": str(module.spec.probabilities), "input": str(module.spec.query)}
        kernel = "attention"
    else:
        grids = {"weight": str(module.spec.weight), "input": str(module.spec.input or "float")}
        kernel = "linear" if len(module.weight_shape) == 2 else "convolution"
    integer = module.reason is None
    return grids | {"kernel": kernel if integer else "", "integer": integer, "reason": module.reason or ""}


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
