"""The bridge to diffusers: artifacts are saved by `save_pretrained` and loaded by `from_pretrained`."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers.quantizers.auto as registry
import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from stepquant.artifact import UNCOVERED, bounds_of
from stepquant.core.bounds import check_names, check_tensors, check_values
from stepquant.errors import ArtifactError
from stepquant.hub.config import Name, StepquantConfig, digests_of, settings_digest
from stepquant.runtime.dequantize import Living
from stepquant.runtime.lower import prepare, skeleton
from stepquant.runtime.moving import bytes_of, one_device, room_for


class StepquantQuantizer(Living, DiffusersQuantizer):
    """Loads packed integers exactly as they are stored, checks every one of them, and starts the integer runtime."""

    quantization_config: StepquantConfig
    requires_calibration = True

    def __init__(self, quantization_config: StepquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.files: list[str] = []
        self.keys: list[str] = []
        self.loaded: set[str] = set()
        self.widened = False  # whether a float was stored in another dtype than it has here

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
        parts = artifact.layers, artifact.products, artifact.splits, artifact.steps, artifact.policy
        skeleton(model, *parts)
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
        self.quantization_config.check_digests(state_dict, self.where)
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
        """Put the stored tensor in place as it is, floats as wide as they are computed with: diffusers has already cast `param_value`."""
        owner, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(owner)
        with room_for(self.size, target_device):
            value = state_dict[param_name].to(target_device)
        if leaf in module._parameters:
            self.widened |= value.dtype != torch.float32
            module._parameters[leaf] = nn.Parameter(value.float(), requires_grad=False)
        else:
            wanted = module._buffers[leaf].dtype  # type: ignore[union-attr]
            self.widened |= value.dtype != wanted
            module._buffers[leaf] = value.to(wanted)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        check_names(dict.fromkeys(self.loaded), self.expected, self.where)
        if (
            self.quantization_config.format != UNCOVERED
        ):  # a newer diffusers writes settings of its own beside them
            self.quantization_config.settings = settings_digest(model.config)
        if self.follow(model) or self.widened:
            self.quantization_config.renew(digests_of(model.state_dict()))
        prepare(model)


def quantizer_for(config: StepquantConfig, **kwargs: Any) -> StepquantQuantizer:
    """What loads an artifact; float weights, where the configuration names a scheme; or a single file, where it says nothing."""
    if config.scheme is None and (config.digests or config.layers or config.products):
        return StepquantQuantizer(config, **kwargs)
    if config.scheme is None:
        from stepquant.hub.foreign.single_file import SingleFileQuantizer

        return SingleFileQuantizer(config, **kwargs)
    from stepquant.hub.on_load import OnLoadQuantizer  # which loading an artifact has no use for

    return OnLoadQuantizer(config, **kwargs)


def register() -> None:
    """Tell diffusers about the method; there is no other way than its two mappings."""
    registry.AUTO_QUANTIZER_MAPPING[Name.STEPQUANT.value] = quantizer_for  # type: ignore[assignment]
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[Name.STEPQUANT.value] = StepquantConfig


register()
