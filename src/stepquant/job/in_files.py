"""Pipelines whose networks stay in their safetensors files: weights are mapped, and read as they are called."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, PreTrainedModel

from stepquant.calib.cache import cache_folder
from stepquant.core.mapped import MappedParameter, copied, mapping
from stepquant.errors import ModelError, StepquantError
from stepquant.job.pipelines import find_folder, name_of, open_pipeline, ready, without_bars
from stepquant.job.tensors import NAMES, OF_TEXTS, Place, is_saved, weights_in
from stepquant.models.denoiser import denoisers
from stepquant.models.pipelines.index import read_index
from stepquant.progress import Progress

QUANTIZED = "quantization_config"
GENERATING = "generation_config.json"
SAVED = ("_parameters", "_buffers", "_modules")  # what a module has by names


def load_in_files(model: str, device: str, progress: Progress) -> Any:
    """A float pipeline, of whose networks nothing is in memory but what the system keeps there by itself.

    Its denoisers are so in any case. Others whose files are pickled, or name other tensors than their class, are loaded.
    """
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
    parts = parts_in(source, networks, progress)
    return ready(open_pipeline(source, **networks, **parts), name_of(model, source), device)


def networks_in(folder: Path) -> dict[str, Any]:
    """The denoisers of a pipeline's folder, without their weights."""
    chosen = denoisers(SimpleNamespace(**without_weights(folder)))
    if not chosen:
        raise ModelError(
            "the pipeline has no denoiser that diffusers knows",
            where=str(folder),
            fix="leave out --low-memory",
        )
    return chosen


def without_weights(folder: Path) -> dict[str, Any]:
    """The networks of diffusers in a pipeline's folder."""
    found = {}
    for name, kind in kinds_in(folder, diffusers, ModelMixin).items():
        settings = kind.load_config(folder / name)
        if QUANTIZED in settings:
            raise ModelError(
                "the model is quantized already",
                where=str(folder / name),
                fix="start from the float model",
            )
        found[name] = without_storage(kind, settings).eval()
    return found


def without_storage(kind: Any, settings: Mapping[str, Any]) -> Any:
    """A network of which only what no file has takes memory: tables, where the class makes some that are not saved."""
    with torch.device("meta"):
        model = kind.from_config(settings)
    if not any(value.is_meta for value in made_beside(model)):
        return model
    with init_empty_weights(), UnreservedWeights():
        return kind.from_config(settings)


def made_beside(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of a network that are not saved with it."""
    for module in model.modules():
        kept = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        own = {name: value for name, value in vars(module).items() if name not in SAVED}
        yield from (leaf for leaf in tree_leaves([kept, own]) if isinstance(leaf, Tensor))


class UnreservedWeights(TorchFunctionMode):
    """Layers ask for memory that they do not fill yet, and what becomes of it takes none here: freed again it would lie
    between what stays, and for a network be as much as its weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def kinds_in(folder: Path, library: Any, base: type) -> dict[str, Any]:
    """Component -> class, of the components that are networks of this library."""
    parts = {name: entry for name, entry in read_index(folder).items() if isinstance(entry, list)}
    named = {name: entry[1] for name, entry in parts.items() if (folder / name).is_dir()}
    found = {name: getattr(library, str(kind), None) for name, kind in named.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, base)}


def parts_in(folder: Path, aimed: Container[str], progress: Progress) -> dict[str, Any]:
    """What else can stay in its files: autoencoders, text encoders."""
    found = {}
    for name, network in without_weights(folder).items():
        place = folder / name
        if name not in aimed and is_saved(place) and set(network.state_dict()) <= set(weights_in(place)):
            map_weights(network, place, progress)
            found[name] = network
    for name, kind in kinds_in(folder, transformers, PreTrainedModel).items():
        config = kind.config_class.from_pretrained(folder / name)
        if is_saved(folder / name, OF_TEXTS) and not hasattr(config, QUANTIZED):
            found[name] = text_encoder(kind, config, folder / name, progress)
    return found


def text_encoder(kind: Any, config: Any, folder: Path, progress: Progress) -> Any:
    """A network of transformers, which knows by what names its weights go in older files."""
    places = weights_in(folder, OF_TEXTS)
    kinds = {name: as_computed(place.kind) for name, place in places.items()}
    values = dict(in_files(places, kinds, folder, progress))
    with without_bars():
        model = kind.from_pretrained(None, config=config, state_dict=values, dtype=torch.float32)
    if model.can_generate() and (folder / GENERATING).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    known = {value.data_ptr() for value in values.values()}

    def there(former: Tensor) -> MappedParameter:
        value = former.detach()
        on_disk = value if value.data_ptr() in known else copied(value, cache_folder())
        return MappedParameter.of(on_disk, cache_folder(), like=former)

    made = {former: there(former) for former in model.parameters()}
    for module in model.modules():
        own, buffers = module._parameters, module._buffers
        # One, where several modules share it: tokens of T5.
        own.update({leaf: former if former is None else made[former] for leaf, former in own.items()})
        buffers.update({leaf: value if value is None else value.clone() for leaf, value in buffers.items()})
    return model


def as_computed(kind: torch.dtype) -> torch.dtype:
    return torch.float32 if kind.is_floating_point else kind


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
    """Let a network without storage read its weights where they lie."""
    floats, places = network.state_dict(), weights_in(folder)
    check_places(places, floats, folder)
    kinds = {name: value.dtype for name, value in floats.items()}
    for name, value in in_files(places, kinds, folder, progress):
        put(network, name, value)


def in_files(
    places: Mapping[str, Place], kinds: Mapping[str, torch.dtype], folder: Path, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """These tensors where they lie.

    What has another type there than it is computed in is converted once, into nameless files beside the recorded
    trajectories.
    """
    files = {file: mapping(file) for file in {places[name].file for name in kinds}}
    foreign = {name for name, kind in kinds.items() if not fits(places[name], kind)}
    if foreign:
        size = sum(math.prod(places[name].shape) * kinds[name].itemsize for name in foreign)
        stored = ", ".join(sorted({NAMES[places[name].kind] for name in foreign}))
        progress.note(
            f"{len(foreign)} weights of {folder.name} are {stored} in their files: they are converted once, {size / 1e9:.2f} GB on disk in {cache_folder()}"
        )
    for name, kind in progress.track(kinds.items(), f"mapping {folder.name}", len(kinds)):
        value = places[name].among(files[places[name].file])
        yield name, copied(value, cache_folder(), kind) if name in foreign else value


def fits(place: Place, kind: torch.dtype) -> bool:
    """Whether a tensor can be read where it lies: some programs write them at odd places."""
    return place.kind == kind and place.begin % place.kind.itemsize == 0


def put(network: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    if leaf in module._parameters:
        former: Any = module._parameters[leaf]
        module._parameters[leaf] = MappedParameter.of(value, cache_folder(), like=former)
    else:
        module._buffers[leaf] = copied(value, cache_folder())  # some classes write to them
