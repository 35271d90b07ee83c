"""Artifact: packed integer weights, scales, plan and provenance; the only thing that leaves quantizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.core.steps import StepCorrection, StepTable
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
    shifted: bool = False  # a constant is added to the quantized probabilities

    def to_json(self) -> dict[str, Any]:
        grids = {port: str(getattr(self, port)) for port in ("query", "key", "value", "probabilities")}
        return grids | ({"shifted": True} if self.shifted else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProductSpec:
        grids = {port: Grid.parse(text) for port, text in data.items() if port != "shifted"}
        return cls(**grids, shifted=bool(data.get("shifted", False)))


@dataclass(frozen=True)
class StepSpec:
    """What of an artifact has a row for every step: the sizes of the tables below `steps.` on disk."""

    times: int  # values of t that are known
    groups: int = 1  # rows of the ranges
    table: int = 0  # columns of what the time embedding becomes; 0: computed as ever
    channels: int = 0  # of the correction; 0: none
    noise: str = "none"  # what becomes of the correction's variance

    def to_json(self) -> dict[str, int | str]:
        return asdict(self)


@dataclass(frozen=True)
class Artifact:
    """Tensors under the names they have on disk, what they mean, and how they came about."""

    layers: Mapping[str, LayerSpec]
    products: Mapping[str, ProductSpec]
    tensors: Mapping[str, Tensor]
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    steps: StepSpec | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def with_correction(self, correction: StepCorrection, table: StepTable) -> Artifact:
        """This artifact, its predictions corrected at every step of the table."""
        own = self.steps or StepSpec(len(table.times))
        kept = table_tensors(table)
        if self.steps is not None and not torch.equal(self.tensors["steps.bits"], kept["steps.bits"]):
            raise ArtifactError(
                "ranges and correction were made for different steps",
                fix="quantize and correct with the same sampler and number of steps",
            )
        kept = {name: self.tensors.get(name, value) for name, value in kept.items()}
        values = {name: getattr(correction, name) for name in ("scale", "bias", "variance")}
        tensors = {f"steps.correction_{name}": value.float().contiguous() for name, value in values.items()}
        spec = replace(own, channels=correction.scale.shape[1], noise=correction.noise)
        return replace(self, steps=spec, tensors={**self.tensors, **kept, **tensors})

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of the folder, without the tensors."""
        return {
            "layers": {path: spec.to_json() for path, spec in sorted(self.layers.items())},
            "products": {path: spec.to_json() for path, spec in sorted(self.products.items())},
            "splits": {path: list(widths) for path, widths in sorted(self.splits.items())},
            "steps": self.steps.to_json() if self.steps else None,
            "recipe": dict(self.recipe),
        }


def freeze(network: Inserted, time_table: Tensor | None = None) -> Artifact:
    """Round and pack what the quantizers describe; the network itself is left as it is.

    `time_table` has a row for each t of the network's clock, in place of the layers that depend on t alone.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, LayerSpec] = {}
    products: dict[str, ProductSpec] = {}
    for path, layer in network.layers.items():
        if layer.weight_quantizer is None:
            continue
        inputs = layer.input_quantizer.grid if layer.input_quantizer else None
        layers[path] = LayerSpec(layer.weight_quantizer.grid, inputs)
        tensors |= {f"{path}.{name}": value for name, value in packed_tensors(layer).items()}
    for path, product in network.products.items():
        grids = {port: quantizer.grid for port, quantizer in product.ports().items()}
        products[path] = ProductSpec(**grids, shifted=product.shift is not None)
        if product.shift is not None:
            tensors[f"{path}.product.probabilities_shift"] = product.shift.cpu().float().reshape(1)
        for port, quantizer in product.ports().items():
            tensors |= range_tensors(f"{path}.product.{port}", quantizer)
    steps = None
    if network.clock is not None:
        table = network.clock.table
        tensors |= table_tensors(table)
        steps = StepSpec(len(table.times), table.groups)
        if time_table is not None:
            tensors["steps.table"] = time_table.detach().cpu().float().contiguous()
            steps = replace(steps, table=time_table.shape[1])
    return Artifact(layers, products, tensors, dict(network.splits), steps)


def table_tensors(table: StepTable) -> dict[str, Tensor]:
    return {"steps.bits": table.to_bits(), "steps.rows": table.rows.int()}


def packed_tensors(layer: QuantLayer) -> dict[str, Tensor]:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    scale, zero_point = quantizer.range()
    integers = layer.weight_integers().cpu()
    out = {"weight": pack(integers, quantizer.grid), "weight_scale": scale.float()}
    if not quantizer.grid.symmetric:
        out["weight_zero_point"] = zero_point.to(torch.int16)
    if layer.bias is not None:
        out["bias"] = layer.bias.detach().float()
    if layer.input_quantizer is not None:
        out |= range_tensors("input", layer.input_quantizer)
    return {name: value.detach().cpu().clone().contiguous() for name, value in out.items()}


def range_tensors(prefix: str, quantizer: Quantizer) -> dict[str, Tensor]:
    scale, zero_point = quantizer.range()
    return {
        f"{prefix}_scale": scale.detach().cpu().float().reshape(-1).clone(),
        f"{prefix}_zero_point": zero_point.detach().cpu().to(torch.int32).reshape(-1).clone(),
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
