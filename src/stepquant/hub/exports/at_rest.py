"""The network of an artifact as it lies on disk: its layers hold their own tensors, checked, and no kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepquant.artifact import bounds_of
from stepquant.core.bounds import check_tensors, check_values
from stepquant.core.entries import AGAIN
from stepquant.errors import ArtifactError
from stepquant.hub.config import Name, StepquantConfig
from stepquant.models.split import SplitLayer
from stepquant.runtime.layers.embedding import IntegerEmbedding
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import skeleton

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Network:
    """A network of packed integers, by which nothing has been computed yet."""

    folder: Path
    settings: Mapping[str, Any]
    config: StepquantConfig
    model: Any

    @property
    def kind(self) -> str:
        return str(self.settings["_class_name"])

    @cached_property
    def layers(self) -> dict[str, IntegerLayer]:
        return {path: one for path, one in self.model.named_modules() if isinstance(one, IntegerLayer)}

    @cached_property
    def tables(self) -> dict[str, IntegerEmbedding]:
        return {path: one for path, one in self.model.named_modules() if isinstance(one, IntegerEmbedding)}

    @cached_property
    def split(self) -> dict[str, SplitLayer]:
        """Layers whose two halves are quantized apart, by the path that they have in the float network."""
        return {path: one for path, one in self.model.named_modules() if isinstance(one, SplitLayer)}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()  # type: ignore[no-any-return]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of the float network, by name."""
        return {name: tuple(value.shape) for name, value in empty(self.settings).state_dict().items()}


def at_rest(folder: Path) -> Network:
    """Read a network's folder; the first thing in it that is wrong is one error."""
    settings = settings_of(folder)
    config = StepquantConfig.from_dict(settings["quantization_config"])
    config.check_settings(settings, str(folder / "config.json"))
    model, own = empty(settings), config.artifact
    skeleton(model, own.layers, own.products, own.splits, own.steps)
    tensors, bounds = tensors_of(folder), bounds_of(own.layers, own.products, own.steps)
    where = str(folder)
    check_tensors(tensors, model.state_dict(), where, bounds)
    config.check_digests(tensors, where)
    check_values(tensors, bounds, where)
    model.load_state_dict(tensors, assign=True)
    return Network(folder, settings, config, model.eval().requires_grad_(False))


def empty(settings: Mapping[str, Any]) -> Any:
    """The float network without numbers."""
    kept = {name: value for name, value in settings.items() if name != "quantization_config"}
    with init_empty_weights():
        return getattr(diffusers, settings["_class_name"]).from_config(kept)


def settings_of(folder: Path) -> dict[str, Any]:
    """The config.json of a network that stepquant has quantized."""
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"'{folder}' holds no network",
            got=str(error).splitlines()[0][:200],
            expected="a folder that `stepquant quantize` wrote, or that of the network in it",
        ) from error
    name = settings.get("_class_name") if isinstance(settings, Mapping) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and issubclass(kind, ModelMixin)):
        raise ArtifactError(
            f"'{file}' names no network of diffusers, and others are not exported",
            got=f"_class_name {name!r}",
            fix="name the folder of the denoiser",
        )
    told = settings.get("quantization_config")
    method = told.get("quant_method") if isinstance(told, Mapping) else None
    if method != Name.STEPQUANT.value or "scheme" in told:
        raise ArtifactError(
            f"the network in '{folder}' holds no packed integers",
            got=f"quant_method {method!r}",
            expected="an artifact",
            fix="stepquant quantize it first",
        )
    return dict(settings)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All that the folder's files hold, mapped and not read yet."""
    index = folder / f"{WEIGHTS}.index.json"
    try:
        names = {WEIGHTS}
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        found: dict[str, Tensor] = {}
        for name in sorted(names):
            found |= load_file(folder / Path(name).name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArtifactError(
            "the weights of the artifact cannot be read",
            where=str(folder),
            got=str(error).splitlines()[0][:200],
            fix=AGAIN,
        ) from error
    return found
