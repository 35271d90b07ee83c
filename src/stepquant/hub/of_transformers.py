"""The bridge to transformers: text encoders are saved and loaded as artifacts, beside the denoiser that reads them."""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers.quantizers.auto as registry
from safetensors import safe_open
from transformers.quantizers.base import HfQuantizer

from stepquant.artifact import bounds_of
from stepquant.core.bounds import check_values
from stepquant.core.entries import AGAIN
from stepquant.errors import ArtifactError, ModelError
from stepquant.hub.config import Name, StepquantConfig
from stepquant.runtime.lower import prepare, skeleton
from stepquant.runtime.moving import one_device


class TransformersQuantizer(HfQuantizer):
    """Loads packed integers as they are stored, checks every one of them, and starts the integer runtime."""

    quantization_config: StepquantConfig  # type: ignore[assignment]
    requires_calibration = True

    def __init__(self, quantization_config: StepquantConfig, **kwargs: Any) -> None:
        if quantization_config.scheme is not None:
            raise ModelError(
                "only denoisers are quantized while they are loaded",
                got=f"{quantization_config} for a model of transformers",
                fix="load it in float, then stepquant.quantize(pipeline, components=('unet', 'text_encoder'))",
            )
        if quantization_config.artifact.policy is not None:
            raise ArtifactError("a policy of steps is for denoisers: no other network receives t", fix=AGAIN)
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What is float stays fp32."""
        return torch.float32

    def update_device_map(self, device_map: Any) -> dict[str, torch.device] | None:
        return None if device_map is None else {"": one_device(device_map)}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> None:
        """Every tensor comes as it is stored."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> Any:
        config, files = self.quantization_config, [str(file) for file in checkpoint_files or ()]
        self.where = ", ".join(files)
        if not all(file.endswith(".safetensors") for file in files):
            raise ArtifactError("an artifact holds no pickled files", where=self.where)
        config.check_settings(settings_of(model), self.where)
        artifact = config.artifact
        skeleton(model, artifact.layers, artifact.products, artifact.splits, artifact.steps)
        check_foreign(files, model.state_dict(), self.where)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """What could not be checked tensor by tensor: transformers has no place for it while it loads."""
        config, found = self.quantization_config, model.state_dict()
        config.check_digests(found, self.where, sorted({*found, *config.digests}))
        artifact = config.artifact
        check_values(found, bounds_of(artifact.layers, artifact.products, artifact.steps), self.where)
        return prepare(model)


def check_foreign(files: list[str], known: dict[str, Any], where: str) -> None:
    """No file holds a tensor that the model does not know; one that is missing has another digest later."""
    for file in files:
        with safe_open(file, "pt") as tensors:
            foreign = sorted(set(tensors.keys()) - set(known))
        if foreign:
            raise ArtifactError(
                f"tensor '{foreign[0]}' is foreign to the artifact",
                where=where,
                got=f"{len(foreign)} extra",
                fix=AGAIN,
            )


def settings_of(model: Any) -> dict[str, Any]:
    """What config.json says of a model of transformers."""
    return dict(json.loads(model.config.to_json_string()))


def register() -> None:
    """Tell transformers about the method; its decorators would refuse to be told twice."""
    registry.AUTO_QUANTIZER_MAPPING[Name.STEPQUANT.value] = TransformersQuantizer
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[Name.STEPQUANT.value] = StepquantConfig


register()
