"""Checks that the tensors of an artifact have sizes and values that the model can take."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from stepquant.artifact import StepSpec, bounds_of
from stepquant.core.bounds import Bounds
from stepquant.core.entries import AGAIN
from stepquant.errors import ArtifactError
from stepquant.models.blocks.structure import structure
from stepquant.models.families.registry import family_of
from stepquant.models.split import find
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.packed import PackedWeight
from stepquant.runtime.steps import StepTensors


def check_steps(model: nn.Module, steps: StepSpec) -> None:
    """The tables are as wide as what they stand in for."""
    chains = structure(model)
    columns = sum(block.width for block in chains.residuals if block.timed) if chains.time else 0
    if steps.tabled:
        columns = sum(math.prod(shape) for shape in steps.tabled.values() if shape)
        check_tabled(model, steps)
    outputs = outputs_of(model)
    for name, width, allowed in (
        ("table", steps.table, (0, columns)),
        ("channels", steps.channels, (0, 1, outputs)),
    ):
        if width not in allowed and None not in allowed:
            raise ArtifactError(
                f"'steps.{name}' does not fit the model",
                where=type(model).__name__,
                got=width,
                expected=" or ".join(map(str, allowed)),
                fix=AGAIN,
            )


def outputs_of(model: nn.Module) -> int | None:
    """The channels of what it predicts; None where its configuration does not say, as where they lie in tokens."""
    outputs = getattr(getattr(model, "config", None), "out_channels", None)
    family = family_of(model)
    return outputs if family.channels == 1 and not family.generic else None


def check_tabled(model: nn.Module, steps: StepSpec) -> None:
    """What is tabled are linears of the model, and each row ends with what one returns."""
    for path, shape in steps.tabled.items():
        layer = find(model, path)
        if not isinstance(layer, nn.Linear) or shape[-1:] not in ((), (layer.out_features,)):
            raise ArtifactError(
                f"no table can stand in for '{path}'",
                where=type(model).__name__,
                got=f"{type(layer).__name__}, rows of {list(shape)}",
                expected="a linear, and rows of its width",
                fix=AGAIN,
            )


def own_bounds(found: Mapping[str, nn.Module]) -> dict[str, Bounds]:
    """What the values in the buffers of these runtime modules may be."""
    layers = {path: module.spec for path, module in found.items() if isinstance(module, PackedWeight)}
    ends = {path: module.spec for path, module in found.items() if isinstance(module, IntegerProduct)}
    products = {path.removesuffix(".product"): spec for path, spec in ends.items()}
    steps = next((module.spec for module in found.values() if isinstance(module, StepTensors)), None)
    return bounds_of(layers, products, steps)
