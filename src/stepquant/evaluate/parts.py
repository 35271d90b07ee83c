"""The quantized networks beside the denoiser: their size, and what ran in integers when the pipeline was asked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepquant import hub
from stepquant.core.grid import FLOAT_BITS
from stepquant.evaluate.cost import grids, kernel_name, stored_bytes
from stepquant.models.denoiser import denoisers
from stepquant.models.generate import run
from stepquant.models.part import Part, Received, receiving
from stepquant.models.sampling import Sampling
from stepquant.runtime.coverage import Coverage, Line, traced
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.packed import PackedWeight
from stepquant.runtime.parameters import numbers_in


def quantized_parts(pipeline: Any) -> list[Part]:
    """The quantized networks of a pipeline that do not denoise."""
    aimed = [id(network) for network in denoisers(pipeline).values()]
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return [
        Part(model, name)
        for name, model in networks.items()
        if id(model) not in aimed and hub.config_of(model) is not None
    ]


def describe_parts(pipeline: Any, folder: Path, sampling: Sampling) -> list[dict[str, Any]]:
    """A row for each: who it is, its bytes against fp32, and its layers as one call of the pipeline used them."""
    parts = quantized_parts(pipeline)
    if not parts:
        return []
    called = calls_of(pipeline, parts, sampling)
    return [describe_part(part, folder, called[part.component]) for part in parts]


def calls_of(pipeline: Any, parts: Sequence[Part], sampling: Sampling) -> Mapping[str, list[Received]]:
    """The first call of every kind that each part receives while the pipeline makes one result."""
    found: dict[str, dict[str, Received]] = {part.component: {} for part in parts}

    def keeper(known: dict[str, Received]) -> Any:
        return lambda call: known.setdefault(call.entry, call)

    listening = [receiving(part.model, keeper(found[part.component])) for part in parts]
    for one in listening:
        one.__enter__()
    try:
        with torch.no_grad():
            run(pipeline, [0], sampling)
    finally:
        for one in listening:
            one.__exit__(None, None, None)
    return {name: list(known.values()) for name, known in found.items()}


def describe_part(part: Part, folder: Path, calls: Sequence[Received]) -> dict[str, Any]:
    config = hub.config_of(part.model)
    assert config is not None
    lines = together([traced(part.model, partial(call.repeat, part.model)) for call in calls])
    stored = sum(file.stat().st_size for file in (folder / part.component).glob("*.safetensors"))
    full = float_bytes(part.model)
    return {
        "name": part.component,
        "class": type(part.model).__name__,
        "digest": config.digest[:12],
        "size": {"float_bytes": full, "bytes": stored, "ratio": stored / full},
        "coverage": [row_of(part, line) for line in lines],
    }


def together(traces: Sequence[Coverage]) -> list[Line]:
    """One line for each layer: what it did in that call in which it did most."""
    best: dict[str, Line] = {}
    for line in (line for trace in traces for line in trace.lines):
        known = best.get(line.path)
        if known is None or line.macs > known.macs:
            best[line.path] = line
    return list(best.values())


def row_of(part: Part, line: Line) -> dict[str, Any]:
    module: Any = dict(part.model.named_modules()).get(line.path)
    if line.kind == "product":
        module = getattr(module, "product", None)
    return (
        {"path": line.path, "role": line.kind, "macs": line.macs, "bytes": stored_bytes(module)}
        | grids(module)
        | {"kernel": kernel_name(module) if line.integer else "", "integer": line.integer}
        | {"reason": line.reason or ""}
    )


def float_bytes(model: nn.Module) -> int:
    """What its weights would take in fp32."""
    count = 0
    for module in model.modules():
        if isinstance(module, PackedWeight):
            count += numbers_in(module)
        elif not isinstance(module, IntegerProduct):
            kept = set(module._buffers) - module._non_persistent_buffers_set
            own = [*module._parameters.values(), *(module._buffers[name] for name in kept)]
            count += sum(tensor.numel() for tensor in own if tensor is not None)
    return FLOAT_BITS // 8 * count
