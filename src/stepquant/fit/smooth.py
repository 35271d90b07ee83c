"""Divide channels by how large the embedding of the step makes them; what reads them has the weights for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.errors import CalibrationError
from stepquant.models.blocks.scaled import ScaledChannels
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Progress
from stepquant.quant.layers import QuantLayer


def mean_sizes(
    denoiser: Denoiser, channels: Sequence[ScaledChannels], data: CalibSet, batch: int, progress: Progress
) -> dict[str, Tensor]:
    """Reader -> how large the embedding makes each of its channels, on average over records; never below 1."""
    if not channels:
        return {}
    sums: dict[ScaledChannels, Tensor] = {}
    counts: dict[ScaledChannels, int] = {}

    def note(one: ScaledChannels, embedded: Tensor) -> None:
        sizes = one.size(embedded).clamp(min=1)
        sums[one] = sums.get(one, 0) + sizes.sum(0)
        counts[one] = counts.get(one, 0) + len(sizes)

    with ExitStack() as hooks, torch.no_grad():
        for one in channels:
            layer = denoiser.model.get_submodule(one.embedding)
            hooks.callback(layer.register_forward_hook(lambda _m, _a, out, one=one: note(one, out)).remove)
        for records in progress.track(data.batches(batch), "embeddings", -(-len(data) // batch)):
            denoiser.predict(records.arguments)
    return {reader: total / counts[one] for one, total in sums.items() for reader in one.readers}


def divide_channels(layers: Mapping[str, QuantLayer], sizes: Mapping[str, Tensor]) -> list[str]:
    """Exact in float: x / s meets W s. Layers that read floats stay as they are; returns the others."""
    divided = []
    for path, size in sizes.items():
        layer = layers.get(path)
        if layer is None or layer.weight_quantizer is None or layer.input_quantizer is None:
            continue
        if not size.isfinite().all():
            raise CalibrationError(
                f"what the embedding makes of the inputs of '{path}' is not finite",
                fix="keep this layer in float with a plan rule",
            )
        if len(size) == layer.weight.shape[1]:
            layer.divide(size.reciprocal(), None)
            divided.append(path)
    return divided
