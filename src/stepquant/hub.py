"""The bridge to diffusers: artifacts are saved by `save_pretrained` and loaded by `from_pretrained`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers.quantizers.auto as diffusers_registry
import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from stepquant.artifact import (
    ALLOWED,
    FORMAT,
    FORMATS,
    KEYS,
    NEEDED,
    UNCOVERED,
    Artifact,
    LayerSpec,
    ProductSpec,
    StepSpec,
    bounds_of,
)
from stepquant.core.bounds import check_names, check_tensors, check_values
from stepquant.core.digest import tensors_digest, value_digest
from stepquant.core.entries import AGAIN, entries
from stepquant.errors import ArtifactError
from stepquant.runtime.dequantize import Living
from stepquant.runtime.lower import lower, prepare, skeleton
from stepquant.runtime.moving import bytes_of, one_device, room_for

# What diffusers may add to a model's configuration beside names that begin with an underscore.
NOT_OF_THE_NETWORK = ("quantization_config", "torch_dtype", "dtype", "auto_map")


class Name(StrEnum):
    """diffusers asks a quantization method for its `.value`."""

    STEPQUANT = "stepquant"


class StepquantConfig(QuantizationConfigMixin):
    """The `quantization_config` in a model's config.json: what every packed tensor means, and where it came from."""

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, str]],
        products: Mapping[str, Mapping[str, Any]] | None = None,
        splits: Mapping[str, Sequence[int]] | None = None,
        steps: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        format: int = FORMAT,
        digests: Mapping[str, str] | None = None,
        settings: str | None = None,
    ) -> None:
        self.quant_method = Name.STEPQUANT  # type: ignore[assignment]
        self.layers, self.products, self.splits = dict(layers), dict(products or {}), dict(splits or {})
        self.steps = dict(steps) if steps else None
        self.recipe, self.format = dict(recipe or {}), format
        self.digests = dict(digests or {})  # tensor -> digest of what was saved
        self.settings = settings  # digest of the model's own configuration
        self.artifact = Artifact(  # what it describes, read once, without its tensors
            {path: LayerSpec.from_json(spec, f"layers.{path}") for path, spec in self.layers.items()},
            {path: ProductSpec.from_json(spec, f"products.{path}") for path, spec in self.products.items()},
            {},
            {path: tuple(widths) for path, widths in self.splits.items()},
            None if self.steps is None else StepSpec.from_json(self.steps),
        )

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What config.json holds, if this version reads its format and nobody has edited it."""
        version = config_dict.get("format") if isinstance(config_dict, Mapping) else FORMAT
        if type(version) is not int or version not in FORMATS:
            raise ArtifactError(
                "the folder was written in a format this version does not know",
                got=f"format {version}",
                expected=f"format {' or '.join(map(str, FORMATS))}",
                fix="install the version of stepquant that wrote it (see its model card)",
            )
        needed = NEEDED if version == FORMAT else {k: v for k, v in NEEDED.items() if k != "settings"}
        found = entries(config_dict, "quantization_config", needed, ALLOWED)
        config = cls(**{key: value for key, value in found.items() if key in KEYS})
        if found["digest"] != config.digest:
            raise edited("its `quantization_config` is not the one that was saved")
        return (config, kwargs) if return_unused_kwargs else config

    @cached_property
    def digest(self) -> str:
        """One digest for the whole artifact."""
        if self.format == UNCOVERED:
            return value_digest(self.digests)
        # Through JSON, so that it is the same before saving and after.
        return value_digest(json.loads(json.dumps(self.described(), default=str)))

    def renew(self, digests: Mapping[str, str]) -> None:
        self.digests = dict(digests)
        vars(self).pop("digest", None)

    def described(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in KEYS if key != "settings"}

    def check_settings(self, settings: Mapping[str, Any], where: str | None = None) -> None:
        """The configuration of the model is the one that the artifact was saved with."""
        # Where config.json says nothing, diffusers fills in its own default: that is not for the digest to know.
        filled = settings.get("_use_default_values")
        told = {k: v for k, v in settings.items() if not isinstance(filled, list) or k not in filled}
        if self.format != UNCOVERED and self.settings != settings_digest(told):
            raise edited("the model's own settings are not those that were saved", where)

    def to_dict(self) -> dict[str, Any]:
        keys = [key for key in (*KEYS, "digest") if self.format != UNCOVERED or key != "settings"]
        return {"quant_method": self.quant_method.value} | {key: getattr(self, key) for key in keys}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"StepquantConfig({len(self.layers)} layers, {len(self.products)} products, digest {self.digest[:12]})"


class StepquantQuantizer(Living, DiffusersQuantizer):
    """Loads packed integers exactly as they are stored, checks every one of them, and starts the integer runtime."""

    quantization_config: StepquantConfig
    requires_calibration = True

    def __init__(self, quantization_config: StepquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.files: list[str] = []
        self.keys: list[str] = []
        self.loaded: set[str] = set()

    def update_device_map(self, device_map: Any) -> dict[str, torch.device] | None:
        """One device for the whole network; where diffusers may choose, the accelerator if there is one."""
        return None if device_map is None else {"": one_device(device_map)}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.keys, self.files = list(loaded_keys), [str(file) for file in checkpoint_files]
        if not all(file.endswith(".safetensors") for file in self.files):
            raise ArtifactError("an artifact holds no pickled files", where=", ".join(self.files))
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config, artifact = self.quantization_config, self.quantization_config.artifact
        config.check_settings(model.config, self.where)
        if config.format == UNCOVERED:
            warnings.warn(
                f"this artifact is of format {UNCOVERED}, whose config.json is covered by no digest: "
                "whether it was edited is not known. Quantize the model again to have it covered.",
                stacklevel=2,
            )
        skeleton(model, artifact.layers, artifact.products, artifact.splits, artifact.steps)
        model.config.quantization_config = config
        self.expected = {name: value.to("meta") for name, value in model.state_dict().items()}
        self.size = bytes_of(self.expected.values())
        self.bounds = bounds_of(artifact.layers, artifact.products, artifact.steps)
        check_names(dict.fromkeys(self.keys), self.expected, self.where)

    @property
    def where(self) -> str:
        return ", ".join(self.files)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of one file; there may be several."""
        wanted = {name: self.expected[name] for name in state_dict if name in self.expected}
        check_tensors(state_dict, wanted, self.where, self.bounds)
        for name, digest in digests_of(state_dict).items():
            if self.quantization_config.digests.get(name) != digest:
                raise ArtifactError(
                    f"tensor '{name}' was altered after the artifact was saved, or belongs to another config.json",
                    where=self.where,
                    got=f"digest {digest}",
                    expected=f"digest {self.quantization_config.digests.get(name)}",
                    fix=AGAIN,
                )
        check_values(state_dict, self.bounds, self.where)
        self.loaded |= set(state_dict)
        return state_dict

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        return True

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the stored tensor in place as it is: diffusers has already cast `param_value`."""
        owner, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(owner)
        with room_for(self.size, target_device):
            value = state_dict[param_name].to(target_device)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value.float(), requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        check_names(dict.fromkeys(self.loaded), self.expected, self.where)
        if (
            self.quantization_config.format != UNCOVERED
        ):  # a newer diffusers writes settings of its own beside them
            self.quantization_config.settings = settings_digest(model.config)
        if self.follow(model):
            self.quantization_config.renew(digests_of(model.state_dict()))
        prepare(model)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Over what decides the network: all that config.json says of the model, whatever the version that wrote it."""
    kept = {k: v for k, v in settings.items() if not k.startswith("_") and k not in NOT_OF_THE_NETWORK}
    return value_digest(json.loads(json.dumps(kept, default=str)))


def edited(how: str, where: str | None = None) -> ArtifactError:
    return ArtifactError(f"config.json was edited: {how}", where=where, fix=AGAIN)


def check_folder(folder: Path) -> None:
    """Read what the artifacts in a pipeline's folder say of themselves, before anything is built from it."""
    for file in sorted(folder.glob("*/config.json")):
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # diffusers says what is wrong with it
        quantized = settings.get("quantization_config") if isinstance(settings, Mapping) else None
        if isinstance(quantized, Mapping) and quantized.get("quant_method") == Name.STEPQUANT.value:
            try:
                StepquantConfig.from_dict(quantized).check_settings(settings)
            except ArtifactError as error:
                where = f"{file}{f' ({error.where})' if error.where else ''}"
                raise ArtifactError(
                    error.what, where=where, got=error.got, expected=error.expected, fix=error.fix
                ) from error


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: tensors_digest({name: value})[:12] for name, value in tensors.items()}


def attach(model: Any, artifact: Artifact) -> None:
    """Make `model` run in the integers of `artifact`, in place, and let `save_pretrained` write it."""
    dtype = model.dtype
    lower(model, artifact)
    digests = digests_of(model.state_dict())
    config = StepquantConfig(**artifact.to_json(), digests=digests, settings=settings_digest(model.config))
    model.hf_quantizer = StepquantQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.register_to_config(quantization_config=config, _pre_quantization_dtype=dtype)


def config_of(model: nn.Module) -> StepquantConfig | None:
    """How a model was quantized; None for a float one."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config if isinstance(quantizer, StepquantQuantizer) else None


def register() -> None:
    """Tell diffusers about the method; there is no other way than its two mappings."""
    diffusers_registry.AUTO_QUANTIZER_MAPPING[Name.STEPQUANT.value] = StepquantQuantizer
    diffusers_registry.AUTO_QUANTIZATION_CONFIG_MAPPING[Name.STEPQUANT.value] = StepquantConfig


register()
