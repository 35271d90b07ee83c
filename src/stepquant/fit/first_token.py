"""The first token of a text, where it is the same for all texts: what layers make of it is known once and for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import Inserted

READERS = ("k_text", "v_text")
SAME = 1e-4  # of the greatest number: what another batch changes in the sums of a text encoder


class FirstToken:
    """What a linear reads first in every text, and what it returns for it."""

    def __init__(self) -> None:
        self.token: Tensor | None = None
        self.second: Tensor | None = None
        self.output: Tensor | None = None
        self.differs, self.others_differ = False, False

    def see(self, x: Tensor, y: Tensor) -> None:
        if x.ndim != 3 or x.shape[1] < 2:
            self.differs = True
            return
        if self.token is None or self.second is None:
            self.token, self.second, self.output = x[0, 0], x[0, 1], y[0, 0]
        self.differs |= not alike(x[:, 0], self.token)
        self.others_differ |= not alike(x[:, 1], self.second)

    @property
    def known(self) -> Tensor | None:
        """None where texts begin otherwise, and where a single text says nothing about others."""
        return None if self.differs or not self.others_differ else self.output


def alike(tokens: Tensor, one: Tensor) -> bool:
    return bool((tokens - one).abs().max() <= SAME * one.abs().max())


def known_first_tokens(denoiser: Denoiser, data: CalibSet, batch: int) -> dict[str, Tensor]:
    """What every linear that reads a text returns for its first token, in the float model, where that is always the same."""
    paths = [path for path, role in denoiser.sites().items() if role in READERS]
    layers = {path: denoiser.model.get_submodule(path) for path in paths}
    seen = {path: FirstToken() for path, layer in layers.items() if isinstance(layer, nn.Linear)}
    if not seen:
        return {}

    def seeing(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            seen[path].see(args[0] if args else kwargs["input"], y)

        return hook

    hooks = [layers[path].register_forward_hook(seeing(path), with_kwargs=True) for path in seen]
    try:
        with torch.no_grad():
            for records in data.batches(batch):
                denoiser.predict(records.arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: found.known for path, found in seen.items() if found.known is not None}


def keep_first(network: Inserted, known: Mapping[str, Tensor]) -> None:
    """Let these layers return what is known for the first token: only the others are quantized and measured."""
    for path, output in known.items():
        if path in network.layers:
            network.layers[path].first = output
