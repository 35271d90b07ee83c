"""From an artifact to a network that runs in its integers and can be saved; and from a folder to what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin
from torch import nn

from stepquant.artifact import Artifact
from stepquant.core.policy import POLICY, RUNTIME, FloatSteps
from stepquant.errors import ArtifactError
from stepquant.hub.config import KEYS, SDNQ, Name, StepquantConfig, digests_of, settings_digest
from stepquant.hub.of_diffusers import StepquantQuantizer
from stepquant.hub.of_transformers import TransformersQuantizer, settings_of
from stepquant.runtime.lower import hold, lower, prepare
from stepquant.runtime.policy import check_policy


def check_folder(folder: Path) -> None:
    """Read what the artifacts in a pipeline's folder say of themselves, before anything is built from it."""
    for file in sorted(folder.glob("*/config.json")):
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # diffusers says what is wrong with it
        quantized = settings.get("quantization_config") if isinstance(settings, Mapping) else None
        if not isinstance(quantized, Mapping):
            continue
        if quantized.get("quant_method") == SDNQ:
            continue  # which stepquant reads, policy and all
        if quantized.get("quant_method") != Name.STEPQUANT.value:
            check_no_policy(quantized, file)
        else:
            try:
                StepquantConfig.from_dict(quantized).check_settings(settings)
            except ArtifactError as error:
                where = f"{file}{f' ({error.where})' if error.where else ''}"
                raise ArtifactError(
                    error.what, where=where, got=error.got, expected=error.expected, fix=error.fix
                ) from error


def check_no_policy(quantized: Mapping[str, Any], file: Path) -> None:
    """Other libraries' integers run by other libraries, which must not leave out what a folder says of its steps."""
    runtime = quantized.get(RUNTIME)
    if isinstance(runtime, Mapping) and POLICY in runtime:
        raise ArtifactError(
            "a policy of steps stands beside integers that stepquant does not run",
            where=f"{file} ({RUNTIME}.{POLICY})",
            got=f"quant_method {quantized.get('quant_method')}",
            expected=f"quant_method {Name.STEPQUANT.value}",
            fix="quantize the float pipeline: stepquant quantize MODEL --policy first=3,last=3 --out DIR",
        )


def attach(model: Any, artifact: Artifact, *, runs: bool = True) -> None:
    """Make `model` run in the integers of `artifact`, in place, and let `save_pretrained` write it.

    One that never `runs` takes no memory of its own for them.
    """
    dtype = model.dtype
    (lower if runs else hold)(model, artifact)
    digests, native = digests_of(model.state_dict()), isinstance(model, ConfigMixin)
    settings = settings_digest(model.config if native else settings_of(model))
    config = StepquantConfig(**artifact.to_json(), digests=digests, settings=settings)
    quantizer: Any = StepquantQuantizer if native else TransformersQuantizer
    model.hf_quantizer = quantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    if native:
        model.register_to_config(quantization_config=config, _pre_quantization_dtype=dtype)
    else:
        model.config.quantization_config = config


def keep_in_float(model: Any, steps: FloatSteps) -> None:
    """Let a network that runs in integers keep its activations in float at some steps, and say so where it is saved."""
    check_policy(model, steps, corrected=False)
    own = model.hf_quantizer.quantization_config
    config = StepquantConfig(**{key: getattr(own, key) for key in KEYS}, runtime=steps.to_json())
    model.hf_quantizer.quantization_config = config
    model.register_to_config(quantization_config=config)
    model.policy = steps
    prepare(model)


def config_of(model: nn.Module) -> StepquantConfig | None:
    """How a model was quantized; None for a float one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, StepquantQuantizer | TransformersQuantizer):
        return quantizer.quantization_config
    return None
