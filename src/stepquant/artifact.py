"""Artifact: packed integer weights, scales, plan and provenance; the only thing that leaves quantizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.errors import ArtifactError
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer


@dataclass(frozen=True)
class LayerSpec:
    """How one convolution or linear is stored; without an input grid only its weights are integers."""

    weight: Grid
    input: Grid | None = None

    def to_json(self) -> dict[str, str]:
        return {"weight": str(self.weight)} | ({"input": str(self.input)} if self.input else {})

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> LayerSpec:
        return cls(Grid.parse(data["weight"]), Grid.parse(data["input"]) if "input" in data else None)


@dataclass(frozen=True)
class ProductSpec:
    """The grids of the four operands of one attention product."""

    query: Grid
    key: Grid
    value: Grid
    probabilities: Grid

    def to_json(self) -> dict[str, str]:
        return {port: str(getattr(self, port)) for port in ("query", "key", "value", "probabilities")}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> ProductSpec:
        return cls(**{port: Grid.parse(text) for port, text in data.items()})


@dataclass(frozen=True)
class Artifact:
    """Tensors under the names they have on disk, what they mean, and how they came about."""

    layers: Mapping[str, LayerSpec]
    products: Mapping[str, ProductSpec]
    tensors: Mapping[str, Tensor]
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of the folder, without the tensors."""
        return {
            "layers": {path: spec.to_json() for path, spec in sorted(self.layers.items())},
            "products": {path: spec.to_json() for path, spec in sorted(self.products.items())},
            "splits": {path: list(widths) for path, widths in sorted(self.splits.items())},
            "recipe": dict(self.recipe),
        }


def freeze(network: Inserted, recipe: Mapping[str, Any] | None = None) -> Artifact:
    """Round and pack what the quantizers describe; the network itself is left as it is."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, LayerSpec] = {}
    products: dict[str, ProductSpec] = {}
    for path, layer in network.layers.items():
        if layer.weight_quantizer is None:
            continue
        layers[path] = LayerSpec(
            layer.weight_quantizer.grid, layer.input_quantizer and layer.input_quantizer.grid
        )
        tensors |= {f"{path}.{name}": value for name, value in packed_tensors(layer).items()}
    for path, product in network.products.items():
        products[path] = ProductSpec(**{port: quantizer.grid for port, quantizer in product.ports().items()})
        for port, quantizer in product.ports().items():
            tensors |= range_tensors(f"{path}.product.{port}", quantizer)
    return Artifact(layers, products, tensors, dict(network.splits), dict(recipe or {}))


def packed_tensors(layer: QuantLayer) -> dict[str, Tensor]:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    scale, zero_point = quantizer.range()
    integers = layer.weight_integers()
    out = {"weight": pack(integers, quantizer.grid), "weight_scale": scale.float()}
    if not quantizer.grid.symmetric:
        out["weight_zero_point"] = zero_point.to(torch.int16)
    if layer.bias is not None:
        out["bias"] = layer.bias.detach().float()
    if layer.input_quantizer is not None:
        out |= range_tensors("input", layer.input_quantizer)
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


def range_tensors(prefix: str, quantizer: Quantizer) -> dict[str, Tensor]:
    scale, zero_point = quantizer.range()
    return {
        f"{prefix}_scale": scale.detach().float().reshape(-1).clone(),
        f"{prefix}_zero_point": zero_point.detach().to(torch.int32).reshape(-1).clone(),
    }


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Every expected tensor is there in its shape, and none besides."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        name = (missing or extra)[0]
        raise ArtifactError(
            f"tensor '{name}' is {'missing from' if missing else 'foreign to'} the artifact",
            where=where,
            got=f"{len(missing)} missing, {len(extra)} extra",
            fix="quantize the model again, or fetch the folder again",
        )
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise ArtifactError(
                f"tensor '{name}' has the wrong shape",
                where=where,
                got=tuple(value.shape),
                expected=tuple(expected[name].shape),
                fix="fetch the folder again: it was truncated or edited",
            )
