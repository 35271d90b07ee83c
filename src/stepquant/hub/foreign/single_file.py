"""A network that runs straight from the file of another program: by `from_single_file` of its class, and by `stepquant.load`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepquant.artifact import bounds_of
from stepquant.core.bounds import check_tensors, check_values
from stepquant.errors import ModelError
from stepquant.hub.config import StepquantConfig, digests_of, settings_digest
from stepquant.hub.foreign.container import LATENT_DIFFUSION, PREFIXES
from stepquant.hub.foreign.convert import Packed, blank, packed
from stepquant.hub.foreign.in_memory import FILE, read_loaded
from stepquant.hub.foreign.network import ForeignFile
from stepquant.hub.of_diffusers import StepquantQuantizer
from stepquant.runtime.lower import prepare, skeleton
from stepquant.runtime.moving import bytes_of


class SingleFileQuantizer(StepquantQuantizer):
    """Puts the integers of a file into a network, as `convert` writes them.

    `from_single_file` sends the tensors through its converter before it has a network. What it is given are their shapes alone;
    when the network is there, its tensors are put in the place of these.
    """

    def __init__(
        self,
        quantization_config: StepquantConfig,
        found: ForeignFile | None = None,
        scheme: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.found, self.by_scheme = found, scheme
        self.made: Packed | None = None

    @property
    def where(self) -> str:
        return str(FILE if self.found is None else self.found.file.path)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The shapes of the tensors, which is all that choosing a configuration and translating names needs."""
        self.found = read_loaded(state_dict)
        file, layers = self.found.file, self.found.layers.values()
        shapes = {one.weight: one.shape for one in layers}
        shapes |= {name: file.entries[name].shape for name in self.found.floats}
        prefix = PREFIXES[0] if LATENT_DIFFUSION in shapes else ""  # as its converters bear them
        return {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def _process_model_before_weight_loading(
        self, model: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        if self.found is None or state_dict is None:
            raise ModelError(
                "StepquantConfig() without the name of a scheme is for files that are packed already",
                fix="from_single_file(FILE) for such a file; StepquantConfig('w8a8-dynamic') for float weights",
            )
        self.made = made = packed(self.found, model, self.by_scheme)
        skeleton(model, made.specs, {}, {})
        bounds = bounds_of(made.specs, {}, None)
        check_tensors(made.tensors, model.state_dict(), self.where, bounds)
        check_values(made.tensors, bounds, self.where)
        self.size = bytes_of(made.tensors.values())
        state_dict.clear()
        state_dict.update(made.tensors)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        assert self.found is not None
        assert self.made is not None
        self.follow(model)
        nameless = {"model": type(model).__name__} if self.found.file.path == FILE else {}
        self.quantization_config = StepquantConfig(
            layers={path: spec.to_json() for path, spec in sorted(self.made.specs.items())},
            recipe={**self.made.recipe, **nameless},
            digests=digests_of(model.state_dict()),
            settings=settings_digest(model.config),
        )
        model.register_to_config(quantization_config=self.quantization_config)
        self.found = self.made = None  # whose tensors are the network's now, or were cast
        prepare(model)


def running(found: ForeignFile, settings: Mapping[str, Any], scheme: str | None = None) -> Any:
    """The network of a file, in its integers: what `from_pretrained` would load of the folder that `convert` writes."""
    quantizer: Any = SingleFileQuantizer(StepquantConfig(), found, scheme)
    model, tensors = blank(settings), dict[str, Tensor]()
    quantizer.preprocess_model(model, state_dict=tensors)
    for name, value in tensors.items():
        quantizer.create_quantized_param(model, value, name, torch.device("cpu"), tensors)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model.eval()
