"""The `quantization_config` in a network's config.json, and how it shows that nobody has edited it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor

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
)
from stepquant.core.digest import tensors_digest, value_digest
from stepquant.core.entries import AGAIN, entries
from stepquant.core.policy import RUNTIME, FloatSteps
from stepquant.errors import ArtifactError

# What diffusers and transformers may add to a model's configuration beside names that begin with an underscore.
NOT_OF_THE_NETWORK = (
    "quantization_config",
    "torch_dtype",
    "dtype",
    "auto_map",
    "architectures",
    "transformers_version",
)


SDNQ = "sdnq"  # the quant_method of folders that are read beside one's own


class Name(StrEnum):
    """diffusers asks a quantization method for its `.value`."""

    STEPQUANT = "stepquant"


class StepquantConfig(QuantizationConfigMixin):
    """The `quantization_config` in a model's config.json: what every packed tensor means, and where it came from.

    With the name of a scheme alone, what `from_pretrained` does to float weights while it loads them; with nothing at all, that
    `from_single_file` keeps the integers of a file that another program packed. `rotation` is for schemes
    whose inputs are quantized by the token: the group, 256 for example, in which linears rotate what they read.
    """

    def __init__(
        self,
        scheme: str | None = None,
        layers: Mapping[str, Mapping[str, str]] | None = None,
        products: Mapping[str, Mapping[str, Any]] | None = None,
        splits: Mapping[str, Sequence[int]] | None = None,
        steps: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        format: int = FORMAT,
        digests: Mapping[str, str] | None = None,
        settings: str | None = None,
        rotation: int | None = None,
        runtime: Mapping[str, Any] | None = None,
    ) -> None:
        self.quant_method = Name.STEPQUANT  # type: ignore[assignment]
        self.scheme, self.rotation = scheme, rotation
        if scheme is not None or rotation is not None:
            from stepquant.hub.on_load import check_rotation, check_scheme  # which an artifact has no use for

            check_rotation(scheme, rotation)
            check_scheme(scheme or "", runtime)
        self.layers, self.products, self.splits = dict(layers or {}), dict(products or {}), dict(splits or {})
        self.steps = dict(steps) if steps else None
        self.recipe, self.format = dict(recipe or {}), format
        self.digests = dict(digests or {})  # tensor -> digest of what was saved
        self.settings = settings  # digest of the model's own configuration
        self.runtime = dict(runtime) if runtime else None
        self.artifact = Artifact(  # what it describes, read once, without its tensors
            {path: LayerSpec.from_json(spec, f"layers.{path}") for path, spec in self.layers.items()},
            {path: ProductSpec.from_json(spec, f"products.{path}") for path, spec in self.products.items()},
            {},
            {path: tuple(widths) for path, widths in self.splits.items()},
            None if self.steps is None else StepSpec.from_json(self.steps),
            policy=None if self.runtime is None else FloatSteps.from_json(self.runtime),
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
        config = cls(**{key: value for key, value in found.items() if key in (*KEYS, RUNTIME)})
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

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries of this artifact; one that is the same at every step says nothing of steps."""
        return KEYS if self.runtime is None else (*KEYS, RUNTIME)

    def described(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.keys if key != "settings"}

    def check_settings(self, settings: Mapping[str, Any], where: str | None = None) -> None:
        """The configuration of the model is the one that the artifact was saved with."""
        # Where config.json says nothing, diffusers fills in its own default: that is not for the digest to know.
        filled = settings.get("_use_default_values")
        told = {k: v for k, v in settings.items() if not isinstance(filled, list) or k not in filled}
        if self.format != UNCOVERED and self.settings != settings_digest(told):
            raise edited("the model's own settings are not those that were saved", where)

    def check_digests(
        self, tensors: Mapping[str, Tensor], where: str, names: Iterable[str] | None = None
    ) -> None:
        """These tensors, or those of these names, are the ones that were saved."""
        now = digests_of(tensors)
        for name in now if names is None else names:
            if now.get(name) != self.digests.get(name):
                raise ArtifactError(
                    f"tensor '{name}' was altered after the artifact was saved, or belongs to another config.json",
                    where=where,
                    got=f"digest {now.get(name)}",
                    expected=f"digest {self.digests.get(name)}",
                    fix=AGAIN,
                )

    def to_dict(self) -> dict[str, Any]:
        if self.scheme is not None:
            rotation = {} if self.rotation is None else {"rotation": self.rotation}
            return {"quant_method": self.quant_method.value, "scheme": self.scheme} | rotation
        keys = [key for key in (*self.keys, "digest") if self.format != UNCOVERED or key != "settings"]
        return {"quant_method": self.quant_method.value} | {key: getattr(self, key) for key in keys}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        if self.scheme is not None:
            rotation = "" if self.rotation is None else f", rotation={self.rotation}"
            return f"StepquantConfig('{self.scheme}'{rotation})"
        return f"StepquantConfig({len(self.layers)} layers, {len(self.products)} products, digest {self.digest[:12]})"


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Over what decides the network: all that config.json says of the model, whatever the version that wrote it."""
    kept = {k: v for k, v in settings.items() if not k.startswith("_") and k not in NOT_OF_THE_NETWORK}
    return value_digest(json.loads(json.dumps(kept, default=str)))


def edited(how: str, where: str | None = None) -> ArtifactError:
    return ArtifactError(f"config.json was edited: {how}", where=where, fix=AGAIN)


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: tensors_digest({name: value})[:12] for name, value in tensors.items()}
