"""Pipelines whose denoisers stay in their safetensors files: weights are mapped, and read as they are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from stepquant.calib.cache import cache_folder
from stepquant.core.mapped import MappedParameter, copied, mapping
from stepquant.errors import ModelError, StepquantError
from stepquant.job.pipelines import find_folder, name_of, open_pipeline, ready
from stepquant.job.tensors import NAMES, Place, weights_in
from stepquant.models.denoiser import denoisers
from stepquant.progress import Progress

QUANTIZED = "quantization_config"


def load_in_files(model: str, device: str, progress: Progress) -> Any:
    """A float pipeline, of whose denoisers nothing is in memory but what the system keeps there by itself."""
    if torch.device(device).type != "cpu":
        raise StepquantError(
            "weights that stay in their files are read by the CPU",
            got=f"--device {device}",
            fix="leave out --device, or --low-memory where that device holds the whole model",
        )
    source = find_folder(model)
    networks = networks_in(source)
    for name, network in networks.items():
        map_weights(network, source / name, progress)
    return ready(open_pipeline(source, **networks), name_of(model, source), device)


def networks_in(folder: Path) -> dict[str, Any]:
    """The denoisers of a pipeline's folder, without their weights."""
    index, found = read_index(folder), {}
    for name, entry in index.items():
        kind = getattr(diffusers, str(entry[1]), None) if isinstance(entry, list) else None
        if isinstance(kind, type) and issubclass(kind, ModelMixin):
            settings = kind.load_config(folder / name)
            if QUANTIZED in settings:
                raise ModelError(
                    "the model is quantized already",
                    where=str(folder / name),
                    fix="start from the float model",
                )
            with init_empty_weights():
                found[name] = kind.from_config(settings).eval()
    chosen = denoisers(SimpleNamespace(**found))
    if not chosen:
        raise ModelError(
            "the pipeline has no denoiser that diffusers knows",
            where=str(folder),
            fix="leave out --low-memory",
        )
    return chosen


def read_index(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return found


def check_places(places: Mapping[str, Place], floats: Mapping[str, Tensor], where: Path) -> None:
    """Every tensor of the network is in the files, in its shape."""
    for name, value in floats.items():
        if name not in places or places[name].shape != value.shape:
            raise ModelError(
                f"weight '{name}' is in no file in its shape",
                where=str(where),
                got=places[name].shape if name in places else None,
                expected=tuple(value.shape),
                fix="load the model with diffusers and save it again, or leave out --low-memory",
            )


def map_weights(network: nn.Module, folder: Path, progress: Progress) -> None:
    """Let a network without storage read its weights where they lie.

    What has another type there than the network computes in is converted once, into nameless files beside the recorded
    trajectories.
    """
    floats, places = network.state_dict(), weights_in(folder)
    check_places(places, floats, folder)
    files = {file: mapping(file) for file in {places[name].file for name in floats}}
    foreign = {name for name, value in floats.items() if not fits(places[name], value)}
    if foreign:
        size = sum(floats[name].nbytes for name in foreign)
        kinds = ", ".join(sorted({NAMES[places[name].kind] for name in foreign}))
        progress.note(
            f"{len(foreign)} weights of {folder.name} are {kinds} in their files: they are converted once, {size / 1e9:.2f} GB on disk in {cache_folder()}"
        )
    for name, like in progress.track(floats.items(), f"mapping {folder.name}", len(floats)):
        place = places[name]
        value = place.among(files[place.file])
        put(network, name, copied(value.to(like.dtype), cache_folder()) if name in foreign else value)


def fits(place: Place, like: Tensor) -> bool:
    """Whether a tensor can be read where it lies: some programs write them at odd places."""
    return place.kind == like.dtype and place.begin % place.kind.itemsize == 0


def put(network: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    if leaf in module._parameters:
        former: Any = module._parameters[leaf]
        module._parameters[leaf] = MappedParameter.of(value, cache_folder(), like=former)
    else:
        module._buffers[leaf] = value.clone()  # small, and some classes write to them
