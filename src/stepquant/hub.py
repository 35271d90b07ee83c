"""The bridge to diffusers: artifacts are saved by `save_pretrained` and loaded by `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import diffusers.quantizers.auto as diffusers_registry
import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from stepquant.artifact import Artifact, LayerSpec, ProductSpec, StepSpec, check_tensors
from stepquant.core.digest import tensors_digest, value_digest
from stepquant.errors import ArtifactError
from stepquant.runtime.lower import lower, prepare, skeleton

FORMAT = 1


class Name(StrEnum):
    """diffusers asks a quantization method for its `.value`."""

    STEPQUANT = "stepquant"


class StepquantConfig(QuantizationConfigMixin):
    """The `quantization_config` in a model's config.json: what every packed tensor means, and where it came from."""

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, str]],
        products: Mapping[str, Mapping[str, str]] | None = None,
        splits: Mapping[str, list[int]] | None = None,
        steps: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        format: int = FORMAT,
        digests: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        known = {"quant_method", "digest", "_pre_quantization_dtype"}
        if format != FORMAT or set(kwargs) - known:
            raise ArtifactError(
                "the folder was written in a format this version does not know",
                got=f"format {format}{''.join(f', key {k}' for k in sorted(set(kwargs) - known))}",
                expected=f"format {FORMAT}",
                fix="install the version of stepquant that wrote it (see its model card)",
            )
        if kwargs.get("digest", value_digest(dict(digests or {}))) != value_digest(dict(digests or {})):
            raise ArtifactError("the digests in config.json were edited", fix="fetch the whole folder again")
        self.quant_method = Name.STEPQUANT  # type: ignore[assignment]
        self.layers, self.products, self.splits = dict(layers), dict(products or {}), dict(splits or {})
        self.steps = dict(steps) if steps else None
        self.recipe, self.format = dict(recipe or {}), format
        self.digests = dict(digests or {})  # tensor -> digest of what was saved

    @property
    def digest(self) -> str:
        """One digest for the whole artifact."""
        return value_digest(self.digests)

    @classmethod
    def of(cls, artifact: Artifact) -> StepquantConfig:
        return cls(**artifact.to_json())

    def layer_specs(self) -> dict[str, LayerSpec]:
        return {path: LayerSpec.from_json(spec) for path, spec in self.layers.items()}

    def product_specs(self) -> dict[str, ProductSpec]:
        return {path: ProductSpec.from_json(spec) for path, spec in self.products.items()}

    def split_widths(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(widths) for path, widths in self.splits.items()}

    def step_spec(self) -> StepSpec | None:
        return StepSpec(**self.steps) if self.steps else None

    def to_dict(self) -> dict[str, Any]:
        keys = ("layers", "products", "splits", "steps", "recipe", "format", "digests", "digest")
        return {"quant_method": self.quant_method.value} | {key: getattr(self, key) for key in keys}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"StepquantConfig({len(self.layers)} layers, {len(self.products)} products, digest {self.digest[:12]})"


class StepquantQuantizer(DiffusersQuantizer):
    """Loads packed integers exactly as they are stored, checks every one of them, and starts the integer runtime."""

    quantization_config: StepquantConfig
    requires_calibration = True

    def __init__(self, quantization_config: StepquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.files: list[str] = []
        self.keys: list[str] = []

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """What is float stays fp32; inside, the runtime computes in bf16 where that is exact enough."""
        return torch.float32

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.keys, self.files = list(loaded_keys), [str(file) for file in checkpoint_files]
        if not all(file.endswith(".safetensors") for file in self.files):
            raise ArtifactError("an artifact holds no pickled files", where=", ".join(self.files))
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        skeleton(
            model, config.layer_specs(), config.product_specs(), config.split_widths(), config.step_spec()
        )
        model.config.quantization_config = config
        names = dict.fromkeys(self.keys, torch.empty(0, device="meta"))
        expected = dict.fromkeys(model.state_dict(), torch.empty(0, device="meta"))
        check_tensors(names, expected, ", ".join(self.files))
        self.expected = {name: value.to("meta") for name, value in model.state_dict().items()}

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        check_tensors(state_dict, {name: self.expected[name] for name in state_dict}, ", ".join(self.files))
        for name, digest in digests_of(state_dict).items():
            if self.quantization_config.digests.get(name) != digest:
                raise ArtifactError(
                    f"tensor '{name}' was altered after the artifact was saved, or belongs to another config.json",
                    where=", ".join(self.files),
                    fix="fetch the folder again, or quantize the model again",
                )
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
        value = state_dict[param_name].to(target_device)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value.float(), requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        prepare(model)


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: tensors_digest({name: value})[:12] for name, value in tensors.items()}


def attach(model: nn.Module, artifact: Artifact) -> None:
    """Make `model` run in the integers of `artifact`, in place, and let `save_pretrained` write it."""
    lower(model, artifact)
    config = StepquantConfig.of(artifact)
    config.digests = digests_of(model.state_dict())
    model.hf_quantizer = StepquantQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.is_quantized, model.quantization_method = True, config.quant_method  # type: ignore[assignment]
    model.register_to_config(quantization_config=config)  # type: ignore[operator]


def config_of(model: nn.Module) -> StepquantConfig | None:
    """How a model was quantized; None for a float one."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config if isinstance(quantizer, StepquantQuantizer) else None


def register() -> None:
    """Tell diffusers about the method; there is no other way than its two mappings."""
    diffusers_registry.AUTO_QUANTIZER_MAPPING[Name.STEPQUANT.value] = StepquantQuantizer
    diffusers_registry.AUTO_QUANTIZATION_CONFIG_MAPPING[Name.STEPQUANT.value] = StepquantConfig


register()
