"""What the network of a file is: its configuration in diffusers' format, by a folder or by what is known of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import try_to_load_from_cache
from torch import nn

from stepquant.errors import ModelError
from stepquant.hub.foreign.container import LATENT_DIFFUSION, PREFIXES
from stepquant.hub.foreign.network import ForeignFile
from stepquant.models.denoiser import COMPONENTS
from stepquant.models.pipelines.index import index_of

NAME = "config.json"
REPOSITORY = "pretrained_model_name_or_path"


def settings_of(found: ForeignFile, config: Path | None) -> dict[str, Any]:
    """What a config.json says of the network, or the folder that holds it, or that of its pipeline; else what is known here."""
    if config is not None and (found.settings is None or index_of(config) is None):
        file = config_file(config)
        return checked(file, read_settings(file))
    if found.settings is not None:
        return checked(found.file.path / NAME, found.settings)
    repository = repository_of(found)
    for component in COMPONENTS:
        cached = repository and try_to_load_from_cache(repository, f"{component}/{NAME}")
        if isinstance(cached, str):
            return checked(Path(cached), read_settings(Path(cached)))
    fetched = f": hf download {repository} --include '*/{NAME}' --local-dir DIR" if repository else ""
    raise ModelError(
        "the file does not say what the network is",
        where=str(found.file.path),
        expected="the folder with the config.json of the float network, or of its pipeline",
        fix=f"give it as --config{fetched}",
    )


def config_file(config: Path) -> Path:
    if not config.is_dir():
        return config
    if index_of(config) is not None:
        return config / denoiser_in(config) / NAME
    return config / NAME


def denoiser_in(pipeline: Path) -> str:
    """Which folder of a pipeline holds the network that denoises."""
    found = [path.name for name in COMPONENTS for path in sorted(pipeline.glob(f"{name}*")) if path.is_dir()]
    if len(found) != 1:
        raise ModelError(
            f"'{pipeline}' does not say which network the file is of",
            got=", ".join(found) or "none that denoises",
            expected=f"a pipeline with one {' or '.join(COMPONENTS)}",
            fix="give the folder of that network as the configuration",
        )
    return found[0]


def repository_of(found: ForeignFile) -> str | None:
    """Where diffusers looks for the configuration of such a file; None where it would have to guess."""
    shapes = {name: found.file.entries[name].shape for name in found.floats}
    shapes |= {layer.weight: layer.shape for layer in found.layers.values()}
    given = {PREFIXES[0] + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        known, guess = (fetch_diffusers_config(names)[REPOSITORY] for names in (given, {}))
    except (KeyError, IndexError, ValueError, UnboundLocalError):
        return None  # which it raises where sizes are none that were published
    plain = LATENT_DIFFUSION in shapes and "label_emb.0.0.weight" not in shapes
    return str(known) if known != guess or plain else None


def read_settings(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"'{file}' does not say what the network is",
            got=str(error).splitlines()[0][:200],
            expected="the config.json of a network, or a folder with it, as diffusers writes it",
            fix="hf download the config.json of the same network in diffusers' format, and give its folder as --config",
        ) from error


def checked(file: Path, settings: Any) -> dict[str, Any]:
    """Settings that name a float network of diffusers."""
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
