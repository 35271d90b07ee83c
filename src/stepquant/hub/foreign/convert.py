"""A network of packed integers from the file of another program, in memory, as `from_pretrained` would load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor

from stepquant.artifact import LayerSpec, bounds_of
from stepquant.core.bounds import check_tensors, check_values
from stepquant.core.grid import Grid
from stepquant.core.policy import FloatSteps
from stepquant.hub.config import StepquantConfig, digests_of, settings_digest
from stepquant.hub.foreign.names import Placed, Translated, translate
from stepquant.hub.foreign.network import ForeignFile, ForeignLayer
from stepquant.hub.foreign.rows import below_each_other, stored
from stepquant.hub.foreign.settings import settings_of
from stepquant.hub.of_diffusers import StepquantQuantizer
from stepquant.hub.on_load import rounded, specs_by
from stepquant.runtime.lower import skeleton
from stepquant.version import __version__

TOKEN = Grid.parse("int8/token")
HOMELESS = "the network has no use for its integers"


@dataclass(frozen=True)
class Packed:
    """A network as its folder has it: layers of integers, and all tensors by diffusers' names."""

    specs: Mapping[str, LayerSpec]
    tensors: Mapping[str, Tensor]
    recipe: Mapping[str, Any]


def network_of(
    found: ForeignFile, config: Path | None, scheme: str | None = None, policy: FloatSteps | None = None
) -> Any:
    """The network, to be saved; loading what was saved makes it run.

    With a scheme, what the file has in floats or in groups becomes what the scheme says: those layers are rounded.
    """
    model = blank(settings_of(found, config))
    made = packed(found, model, scheme)
    skeleton(model, made.specs, {}, {})
    bounds, where = bounds_of(made.specs, {}, None), str(found.file.path)
    check_tensors(made.tensors, model.state_dict(), where, bounds)
    check_values(made.tensors, bounds, where)
    model.load_state_dict(made.tensors, assign=True)
    return described(model, made, policy)


def blank(settings: Mapping[str, Any]) -> Any:
    """The float network without weights."""
    with init_empty_weights():
        return getattr(diffusers, settings["_class_name"]).from_config(settings)


def packed(found: ForeignFile, model: Any, scheme: str | None = None) -> Packed:
    """What the file holds of this network."""
    places = translate(found, model)
    wanted = {} if scheme is None else specs_by(scheme, model)
    specs, tensors, fresh = {}, dict(places.floats), []
    for path in sorted({*places.layers, *wanted}):
        spec, own = layer_of(places.layers[path], found) if path in places.layers else (None, {})
        if path in wanted:
            spec = by_scheme(spec, wanted[path])
        if spec is None:
            spec, own = wanted[path], rounded(floats_of(path, places, found), wanted[path])
            fresh.append(path)
        specs[path] = spec
        bias = tensors.get(f"{path}.bias")
        tensors |= {f"{path}.{leaf}": value for leaf, value in own.items()}
        tensors |= {} if bias is None else {f"{path}.bias": bias.float()}
    recipe = recipe_of(found, type(model).__name__, places.homeless) | {"rounded": fresh}
    recipe |= {} if scheme is None else {"scheme": scheme}
    return Packed(specs, {name: value.contiguous() for name, value in tensors.items()}, recipe)


def by_scheme(spec: LayerSpec | None, wanted: LayerSpec) -> LayerSpec | None:
    """The layer as it is in the file, with inputs as the scheme has them; None where that takes other integers."""
    if spec is None or spec.input is not None or wanted.input is None:
        return spec
    rows = spec.weight.signed and spec.weight.granularity in ("tensor", "channel") and not spec.offset
    return replace(spec, input=wanted.input) if rows else None


def floats_of(path: str, places: Translated, found: ForeignFile) -> Tensor:
    """The numbers of a weight."""
    if path not in places.layers:
        return places.floats[f"{path}.weight"]
    place = places.layers[path]
    return torch.cat([one.floats(found.file) for one in place.sources])[place.rows]


def layer_of(place: Placed, found: ForeignFile) -> tuple[LayerSpec, dict[str, Tensor]]:
    """What it is on disk: the integers of the file, on the plainest grid that has their numbers."""
    sources = place.sources
    grid, tensors = stored(below_each_other([one.rows(found.file) for one in sources]).take(place.rows))
    inputs = TOKEN if all(one.dynamic for one in sources) else None
    rank, branch = 0, sources[0].branch(found.file)
    if branch is not None:  # which only formats have whose layers are those of the network
        down, up = (side.half() for side in branch)
        rank, tensors = len(down), tensors | {"low_rank.down": down, "low_rank.up": up[place.rows]}
    offset = "weight_offset" in tensors
    return LayerSpec(grid, inputs, rotation=sources[0].rotation, rank=rank, offset=offset), tensors


def described(model: Any, made: Packed, policy: FloatSteps | None = None) -> Any:
    """The model with what `save_pretrained` writes of it."""
    config = StepquantConfig(
        layers={path: spec.to_json() for path, spec in sorted(made.specs.items())},
        recipe=made.recipe,
        digests=digests_of(made.tensors),
        settings=settings_digest(model.config),
        runtime=None if policy is None else policy.to_json(),
    )
    quantizer: Any = StepquantQuantizer
    model.hf_quantizer = quantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.register_to_config(quantization_config=config)
    return model


def recipe_of(found: ForeignFile, kind: str, homeless: Collection[str]) -> dict[str, Any]:
    """Where the integers came from."""
    layers = found.layers.values()
    kept = [layer for layer in layers if layer.integer and layer.path not in homeless]
    floats = {layer.path: layer.why_float or HOMELESS for layer in layers if layer not in kept}
    rotations = sorted({layer.rotation for layer in kept} - {0})
    return {
        "model": found.file.path.stem,
        "class": kind,
        "method": "converted",
        "scheme": scheme_of(kept),
        "program": found.program,
        "dialect": found.dialect,
        "formats": dict(sorted(Counter(layer.format for layer in layers).items())),
        "floats": dict(sorted(floats.items())),
        "rotations": rotations,
        "versions": {"stepquant": __version__, "torch": str(torch.__version__)},
    }


def scheme_of(kept: Sequence[ForeignLayer]) -> str:
    """As the bits of weights and of activations would be called here; by the formats where they are many."""
    if not kept:
        return "float"
    if any(layer.dynamic for layer in kept):
        return "w8a8-dynamic"
    return ", ".join(sorted({layer.format for layer in kept}))
