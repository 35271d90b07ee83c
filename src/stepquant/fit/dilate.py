"""Weights dilated along channels that leave their range unused, so that activations shrink by as much (arXiv:2409.14307)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepquant.core.affine import to_groups
from stepquant.quant.layers import QuantLayer

LEAST = 1.001  # what is dilated by less in all channels stays as it is


def dilation(layer: QuantLayer) -> Tensor:
    """How far the weights of each input channel can grow before the first of them leaves its range; 1 where one is there."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    low, high = quantizer.levels.ends()
    rows = to_groups(layer.weight.detach().float(), quantizer.grid)
    ends = torch.where(rows > 0, high, low)
    used = (rows / torch.where(ends == 0, rows, ends)).nan_to_num(0).reshape(layer.weight.shape)
    most = used.transpose(0, 1).flatten(1).amax(1).clamp(max=1)
    return torch.where(most > 0, most, 1).reciprocal()


def dilate(layers: Mapping[str, QuantLayer]) -> dict[str, float]:
    """x / s meets s W, exact in float and on the same scales; returns how far each layer was dilated on average.

    Layers that read floats gain nothing, and stay as they are; so do those in which each output reads some channels alone.
    """
    found = {}
    for path, layer in layers.items():
        quantized = layer.weight_quantizer is not None and layer.input_quantizer is not None
        if not quantized or getattr(layer.layer, "groups", 1) != 1:
            continue
        factors = dilation(layer)
        if factors.max() > LEAST:
            layer.divide(factors.reciprocal(), None)
            found[path] = float(factors.mean())
    return found
