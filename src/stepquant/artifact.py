"""Artifact: packed integer weights, scales, plan and provenance; the only thing that leaves quantizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stepquant.core.bounds import BYTES, FINITE, SCALE, TIMES, VARIANCE, Bounds, zero_points
from stepquant.core.entries import (
    AGAIN,
    ANYTHING,
    OBJECT,
    TEXT,
    TRUTH,
    Kind,
    entries,
    integer,
    list_of,
    one_of,
    optional,
    table_of,
)
from stepquant.core.grid import AS_THEY_COME, SIGNED_CODEBOOKS, Grid, GridError
from stepquant.core.policy import FloatSteps
from stepquant.core.rotation import is_group
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.errors import ArtifactError

# The entries of `quantization_config`.
FORMAT, UNCOVERED = 2, 1  # what is written; what says nothing about its configuration
FORMATS = (UNCOVERED, FORMAT)
NEEDED = {
    "quant_method": one_of("stepquant"),
    "format": integer(1),
    "layers": table_of(OBJECT),
    "digests": table_of(TEXT),
    "digest": TEXT,
    "settings": TEXT,
}
ALLOWED = {
    "products": table_of(OBJECT),
    "splits": table_of(list_of(integer(1), 2)),
    "steps": optional(OBJECT),
    "recipe": OBJECT,
    "runtime": OBJECT,
    "settings": optional(TEXT),
    "_pre_quantization_dtype": ANYTHING,
}
KEYS = ("layers", "products", "splits", "steps", "recipe", "format", "digests", "settings")

GROUP = Kind("a power of four from 4 on", lambda value: type(value) is int and is_group(value))
OPERANDS = ("query", "key", "value", "probabilities")
# Over what scales are shared; elsewhere over tensors and steps.
SHARED = {"weight": ("tensor", "channel", "group"), "input": ("tensor", "step", "token")}
OF_OPERANDS = {"probabilities": ("tensor", "step", "token", "log")}


def stored_grid(port: str, text: str, where: str) -> Grid:
    """A grid that this port can be stored on."""
    allowed = {**SHARED, **OF_OPERANDS}.get(port, ("tensor", "step", "token"))
    try:
        grid = Grid.parse(text)
    except GridError as error:
        raise ArtifactError(
            f"'{where}.{port}' is no grid: {error.what}",
            where=where,
            expected=error.expected,
            fix=AGAIN,
        ) from error
    signed = port != "probabilities"  # which are never negative
    # No zero point is stored.
    bare = grid.granularity == "token" and not (grid.signed == signed and grid.symmetric)
    expected = ""
    if bare:
        expected = f"{'a signed' if signed else 'an unsigned'} symmetric one"
    elif grid.granularity not in allowed:
        expected = f"a grid per {' or '.join(allowed)}"
    elif grid.codebook and SIGNED_CODEBOOKS.get(port) is not grid.signed:
        expected = "a codebook of weights, or of what a layer reads"
    if expected:
        raise ArtifactError(
            f"'{where}.{port}' cannot carry its grid", where=where, got=grid, expected=expected, fix=AGAIN
        )
    return grid


@dataclass(frozen=True)
class LayerSpec:
    """How one convolution or linear is stored; without an input grid only its weights are integers."""

    weight: Grid
    input: Grid | None = None
    _: KW_ONLY
    rotation: int = 0  # the group in which the weight was rotated; 0: it was not
    rank: int = 0  # of the branch beside the integers; 0: none
    balanced: bool = False  # each input channel is multiplied by a factor before it is quantized
    offset: bool = False  # a float beside each scale is added to the numbers that share it
    first: bool = False  # what every first token of a text becomes is stored, and not computed
    input_bits: bool = False  # those of the input differ by step; its grid has the widest

    def to_json(self) -> dict[str, Any]:
        own = {"input": str(self.input) if self.input else None, "rotation": self.rotation, "rank": self.rank}
        own |= {"balanced": self.balanced, "offset": self.offset, "first": self.first}
        own |= {"input_bits": self.input_bits}
        return {"weight": str(self.weight)} | {name: value for name, value in own.items() if value}

    @classmethod
    def from_json(cls, data: Any, where: str = "layer") -> LayerSpec:
        allowed = {"input": TEXT, "rotation": GROUP, "rank": integer(1)}
        allowed |= dict.fromkeys(("balanced", "offset", "first", "input_bits"), TRUTH)
        found = entries(data, where, {"weight": TEXT}, allowed)
        grids = {port: stored_grid(port, found[port], where) for port in SHARED if port in found}
        by_token = "input" in grids and grids["input"].granularity == "token"
        rows = by_token and grids["weight"].granularity in ("tensor", "channel")
        if "rotation" in found and "input" in grids and not rows:
            raise ArtifactError(
                f"'{where}.rotation' stands beside grids that inputs are not rotated for",
                where=where,
                got=", ".join(f"{port} {grid}" for port, grid in grids.items()),
                expected="inputs in float; or per token, and a weight with a scale per tensor or channel",
                fix=AGAIN,
            )
        if found.get("input_bits") and ("input" not in grids or grids["input"].granularity != "step"):
            raise ArtifactError(
                f"'{where}.input_bits' stands beside an input without ranges by step",
                where=where,
                got=f"input {grids['input']}" if "input" in grids else "an input in float",
                expected="a grid per step",
                fix=AGAIN,
            )
        if found.get("offset") and "input" in grids:
            raise ArtifactError(
                f"'{where}.offset' stands beside a grid of inputs",
                where=where,
                got=f"input {grids['input']}",
                expected="inputs in float: integers are not multiplied by weights with an offset",
                fix=AGAIN,
            )
        return cls(**found | grids)


@dataclass(frozen=True)
class ProductSpec:
    """The grids of the four operands of one attention product."""

    query: Grid
    key: Grid
    value: Grid
    probabilities: Grid
    shifted: bool = False  # a constant is added to the quantized probabilities
    first: bool = False  # those of the first key are floats, and the others powers of two

    def to_json(self) -> dict[str, Any]:
        grids = {port: str(getattr(self, port)) for port in OPERANDS}
        return grids | {name: True for name in ("shifted", "first") if getattr(self, name)}

    def ranged(self) -> tuple[str, ...]:
        """The operands that have a range."""
        return tuple(port for port in OPERANDS if getattr(self, port).granularity not in AS_THEY_COME)

    @property
    def dynamic(self) -> bool:
        """Whether all four operands have scales that are found as they come."""
        return self.query.granularity == "token"

    @classmethod
    def from_json(cls, data: Any, where: str = "product") -> ProductSpec:
        found = entries(
            data, where, dict.fromkeys(OPERANDS, TEXT), dict.fromkeys(("shifted", "first"), TRUTH)
        )
        grids = {port: stored_grid(port, found[port], where) for port in OPERANDS}
        if found.get("first") and grids["probabilities"].granularity != "log":
            raise ArtifactError(
                f"'{where}.first' stands beside probabilities that are no powers of two",
                where=where,
                got=f"probabilities {grids['probabilities']}",
                expected="a grid as uint8/log",
                fix=AGAIN,
            )
        by_token = [grid.granularity == "token" for grid in grids.values()]
        if any(by_token) and ("shifted" in found or not all(by_token)):
            raise ArtifactError(
                f"'{where}' has scales by the token for a part of its operands",
                got=", ".join(map(str, grids.values())),
                expected="all four by the token and no shift, or none",
                fix=AGAIN,
            )
        return cls(**found | grids)


@dataclass(frozen=True)
class StepSpec:
    """What of an artifact has a row for every step: the sizes of the tables below `steps.` on disk."""

    times: int  # values of t that are known
    groups: int = 1  # rows of the ranges
    table: int = 0  # columns of what the time embedding becomes; 0: computed as ever
    # Layer -> shape of its part of those columns, by path; none where nothing reads what it returns. Without
    # any entry, the columns are what residual blocks add.
    tabled: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    channels: int = 0  # of the correction; 0: none
    noise: str = "none"  # what becomes of the correction's variance

    def to_json(self) -> dict[str, Any]:
        tabled = {path: list(shape) for path, shape in sorted(self.tabled.items())}
        return asdict(self) | {"tabled": tabled}

    @classmethod
    def from_json(cls, data: Any, where: str = "steps") -> StepSpec:
        sizes = {"groups": integer(1), "table": integer(0), "channels": integer(0)}
        noise = one_of("none", "absorb", "sample")
        allowed = {**sizes, "noise": noise, "tabled": table_of(list_of(integer(1), 0))}
        found = entries(data, where, {"times": integer(1)}, allowed)
        tabled = {path: tuple(shape) for path, shape in sorted(found.get("tabled", {}).items())}
        return cls(**found | {"tabled": tabled})


@dataclass(frozen=True)
class Artifact:
    """Tensors under the names they have on disk, what they mean, and how they came about."""

    layers: Mapping[str, LayerSpec]
    products: Mapping[str, ProductSpec]
    tensors: Mapping[str, Tensor]
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    steps: StepSpec | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    policy: FloatSteps | None = None

    def with_correction(self, correction: StepCorrection, table: StepTable) -> Artifact:
        """This artifact, its predictions corrected at every step of the table, behind the correction that it has."""
        own = self.steps or StepSpec(len(table.times))
        kept = table_tensors(table)
        if self.steps is not None and not torch.equal(self.tensors["steps.bits"], kept["steps.bits"]):
            raise ArtifactError(
                "ranges and correction were made for different steps",
                fix="quantize and correct with the same sampler and number of steps",
            )
        kept = {name: self.tensors.get(name, value) for name, value in kept.items()}
        if own.channels:
            scale, bias = (self.tensors[f"steps.correction_{name}"] for name in ("scale", "bias"))
            correction = correction.behind(scale, bias)
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
        } | ({} if self.policy is None else {"runtime": self.policy.to_json()})


def table_tensors(table: StepTable) -> dict[str, Tensor]:
    return {"steps.bits": table.to_bits(), "steps.rows": table.rows.int()}


def bounds_of(
    layers: Mapping[str, LayerSpec], products: Mapping[str, ProductSpec], steps: StepSpec | None
) -> dict[str, Bounds]:
    """Every tensor of an artifact with what its values may be."""
    found: dict[str, Bounds] = {}
    for path, layer in layers.items():
        found |= {f"{path}.weight": BYTES, f"{path}.weight_scale": SCALE, f"{path}.bias": FINITE}
        found[f"{path}.weight_zero_point"] = zero_points(layer.weight)
        found[f"{path}.weight_codebook"] = Bounds(-127, 127, "whole numbers from -127 to 127")
        found |= {f"{path}.weight_offset": FINITE, f"{path}.input_factors": SCALE}
        found[f"{path}.first_output"] = FINITE
        found |= {f"{path}.low_rank.{side}": FINITE for side in ("down", "up")}
        if layer.input is not None and layer.input.granularity != "token":
            found |= range_bounds(f"{path}.input", layer.input)
            widest = layer.input.bits
            found[f"{path}.input_codebook"] = BYTES
            found[f"{path}.input_bits"] = Bounds(2, widest, f"whole numbers from 2 to {widest}")
    for path, product in products.items():
        for port in product.ranged():
            found |= range_bounds(f"{path}.product.{port}", getattr(product, port))
        found[f"{path}.product.probabilities_shift"] = FINITE
    if steps is not None:
        # One group of ranges serves every row; corrections have a row for each time.
        last = (steps.groups if steps.groups > 1 else steps.times) - 1
        found["steps.bits"] = TIMES
        found["steps.rows"] = Bounds(0, last, f"rows from 0 to {last}")
        found |= {f"steps.{name}": FINITE for name in ("table", "correction_scale", "correction_bias")}
        found["steps.correction_variance"] = VARIANCE
    return found


def range_bounds(prefix: str, grid: Grid) -> dict[str, Bounds]:
    return {f"{prefix}_scale": SCALE, f"{prefix}_zero_point": zero_points(grid)}
