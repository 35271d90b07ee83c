"""Float layers of the geometry of integer ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from stepquant.runtime.layers.convolution import IntegerConv1d, IntegerConv2d, IntegerConv3d
from stepquant.runtime.layers.embedding import IntegerEmbedding
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.linear import IntegerLinear

# The one- and three-dimensional convolutions are two-dimensional ones too: they come first.
KINDS: tuple[tuple[type[IntegerLayer], Any], ...] = (
    (IntegerLinear, nn.Linear),
    (IntegerConv1d, nn.Conv1d),
    (IntegerConv3d, nn.Conv3d),
    (IntegerConv2d, nn.Conv2d),
)


def float_kind(layer: object) -> Any:
    """The class of torch that an integer layer stands for; None for any other module."""
    return next((kind for integer, kind in KINDS if isinstance(layer, integer)), None)


def float_twin(layer: Any) -> Any:
    """A float layer of the same geometry, whose numbers nobody has written yet."""
    kind, some = float_kind(layer), {"bias": layer.bias is not None, "device": layer.weight.device}
    if kind is nn.Linear:
        return skip_init(kind, layer.in_features, layer.out_features, **some)
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    geometry = {name: getattr(layer, name) for name in names}
    return skip_init(kind, layer.in_channels, layer.out_channels, **geometry, **some)


def float_layer(layer: IntegerLayer | IntegerEmbedding) -> nn.Module:
    """The layer, or table of embeddings, with the numbers that its integers stand for."""
    if isinstance(layer, IntegerEmbedding):
        return nn.Embedding.from_pretrained(layer.total_weight(torch.float32)).eval()
    twin = float_twin(layer)
    twin.weight = nn.Parameter(layer.total_weight(torch.float32), requires_grad=False)
    if layer.bias is not None:
        twin.bias = nn.Parameter(layer.bias.float().clone(), requires_grad=False)
    return twin.eval()  # type: ignore[no-any-return]
