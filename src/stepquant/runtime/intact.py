"""Checks that the tensors of an artifact have sizes and values that the model can take."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from stepquant.artifact import StepSpec, bounds_of
from stepquant.core.bounds import Bounds
from stepquant.core.entries import AGAIN
from stepquant.errors import ArtifactError
from stepquant.models.blocks.structure import structure
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.steps import StepTensors


def check_steps(model: nn.Module, steps: StepSpec) -> None:
    """The tables are as wide as what they stand in for."""
    chains = structure(model)
    columns = sum(block.width for block in chains.residuals if block.timed) if chains.time else 0
    outputs = getattr(getattr(model, "config", None), "out_channels", None)
    for name, width, allowed in (
        ("table", steps.table, (0, columns)),
        ("channels", steps.channels, (0, 1, outputs)),
    ):
        if width not in allowed:
            raise ArtifactError(
                f"'steps.{name}' does not fit the model",
                where=type(model).__name__,
                got=width,
                expected=" or ".join(str(size) for size in allowed if size is not None),
                fix=AGAIN,
            )


def own_bounds(found: Mapping[str, nn.Module]) -> dict[str, Bounds]:
    """What the values in the buffers of these runtime modules may be."""
    layers = {path: module.spec for path, module in found.items() if isinstance(module, IntegerLayer)}
    ends = {path: module.spec for path, module in found.items() if isinstance(module, IntegerProduct)}
    products = {path.removesuffix(".product"): spec for path, spec in ends.items()}
    steps = next((module.spec for module in found.values() if isinstance(module, StepTensors)), None)
    return bounds_of(layers, products, steps)
