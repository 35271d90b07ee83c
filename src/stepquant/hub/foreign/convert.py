"""A network of packed integers from the file of another program, in memory, as `from_pretrained` would load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from stepquant.artifact import LayerSpec, bounds_of
from stepquant.core.bounds import check_tensors, check_values
from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.errors import ModelError
from stepquant.hub.config import StepquantConfig, digests_of, settings_digest
from stepquant.hub.foreign.comfy import ForeignFile
from stepquant.hub.foreign.names import Placed, translate
from stepquant.hub.of_diffusers import StepquantQuantizer
from stepquant.runtime.lower import skeleton
from stepquant.version import __version__

TOKEN = Grid.parse("int8/token")


def network_of(found: ForeignFile, config: Path) -> Any:
    """The network, to be saved; loading what was saved makes it run."""
    settings = settings_of(config)
    kind = getattr(diffusers, settings["_class_name"])
    with init_empty_weights(include_buffers=True):
        model = kind.from_config(settings)
    places = translate(found, model)
    specs, tensors = {}, dict(places.floats)
    for path, place in places.layers.items():
        specs[path], own = stored(place, found)
        bias = tensors.get(f"{path}.bias")
        tensors |= {f"{path}.{leaf}": value for leaf, value in own.items()}
        tensors |= {} if bias is None else {f"{path}.bias": bias.float()}
    skeleton(model, specs, {}, {})
    bounds, where = bounds_of(specs, {}, None), str(found.file.path)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    check_tensors(tensors, model.state_dict(), where, bounds)
    check_values(tensors, bounds, where)
    model.load_state_dict(tensors, assign=True)
    return described(model, specs, tensors, recipe_of(found, settings))


def settings_of(config: Path) -> dict[str, Any]:
    """What a config.json, or the folder that holds it, says of the network."""
    file = config / "config.json" if config.is_dir() else config
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"'{config}' does not say what the network is",
            got=str(error).splitlines()[0][:200],
            expected="the config.json of a network, or a folder with it, as diffusers writes it",
            fix="hf download the config.json of the same network in diffusers' format, and give its folder as --config",
        ) from error
    name = settings.get("_class_name") if isinstance(settings, Mapping) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelError(
            f"'{file}' names no network of diffusers",
            got=f"_class_name {name!r}",
            expected="the config.json of a network, as of the folder transformer or unet of a pipeline",
        )
    if "quantization_config" in settings:
        raise ModelError(
            f"'{file}' is of a network that is quantized already", expected="that of the float network"
        )
    return dict(settings)


def stored(place: Placed, found: ForeignFile) -> tuple[LayerSpec, dict[str, Tensor]]:
    """The integers of a layer with the scales of their rows; what leaves out -128 is on the symmetric grid."""
    layers = place.sources
    codes = torch.cat([layer.codes(found.file) for layer in layers])[place.rows]
    scales = torch.cat([layer.scales(found.file) for layer in layers])[place.rows]
    single = len(layers) == 1 and not layers[0].by_row
    shape = "" if int(codes.min()) > -128 else "/asym"
    weight = Grid.parse(f"int8/{'tensor' if single else 'channel'}{shape}")
    scales = scales[:1] if single else scales
    tensors = {"weight": pack(codes, weight), "weight_scale": scales.clone()}
    if shape:
        tensors["weight_zero_point"] = torch.zeros(len(scales), dtype=torch.int16)
    in_float = any(layer.marker.float_product for layer in layers)
    return LayerSpec(weight, None if in_float else TOKEN, rotation=layers[0].marker.rotation), tensors


def described(
    model: Any, specs: Mapping[str, LayerSpec], tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]
) -> Any:
    """The model with what `save_pretrained` writes of it."""
    config = StepquantConfig(
        layers={path: spec.to_json() for path, spec in sorted(specs.items())},
        recipe=recipe,
        digests=digests_of(tensors),
        settings=settings_digest(model.config),
    )
    quantizer: Any = StepquantQuantizer
    model.hf_quantizer = quantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.register_to_config(quantization_config=config)
    return model


def recipe_of(found: ForeignFile, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where the integers came from."""
    integers = [layer for layer in found.layers.values() if layer.integer]
    rotations = sorted({layer.marker.rotation for layer in integers} - {0})
    return {
        "model": found.file.path.stem,
        "class": settings["_class_name"],
        "method": "converted",
        "scheme": "w8a8-dynamic" if integers else "float",
        "dialect": found.dialect,
        "rotations": rotations,
        "versions": {"stepquant": __version__, "torch": str(torch.__version__)},
    }
