"""Causal convolutions of autoencoders, and what is kept for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_qwenimage, autoencoder_kl_wan
from torch import Tensor, nn

# Convolutions that read frames they have kept, or zeros, before those that come: ordinary ones after that.
CAUSAL = (autoencoder_kl_wan.WanCausalConv3d, autoencoder_kl_qwenimage.QwenImageCausalConv3d)
# Autoencoders that count them whenever they begin, by a class that no integer layer has.
COUNTING = (autoencoder_kl_qwenimage.AutoencoderKLQwenImage,)


def border_of(layer: Any) -> tuple[int, ...] | None:
    """What a causal convolution pads its input by, in the order of F.pad; None for any other layer."""
    padding: Any = layer._padding if isinstance(layer, CAUSAL) else None
    return None if padding is None else tuple(padding)


def bordered(x: Tensor, border: Sequence[int] | None, kept: Tensor | None = None) -> Tensor:
    """What a causal convolution makes of its input, the frames that it has kept in front of it."""
    if border is None:
        return x
    if kept is None or border[4] <= 0:
        return F.pad(x, tuple(border))
    joined = torch.cat([kept.to(x), x], dim=2)
    return F.pad(joined, (*border[:4], border[4] - kept.shape[2], *border[5:]))


class Cleared:
    """Takes the place of `clear_cache`: as much room as the convolutions needed when they were counted."""

    def __init__(self, model: Any) -> None:
        model.clear_cache()
        self.model, self.rooms = model, (len(model._feat_map), len(model._enc_feat_map))

    def __call__(self) -> None:
        model = self.model
        model._conv_num, model._enc_conv_num = self.rooms
        model._conv_idx, model._enc_conv_idx = [0], [0]
        model._feat_map, model._enc_feat_map = ([None] * room for room in self.rooms)


def keep_counts(model: nn.Module) -> None:
    """Before layers are replaced, which would not be counted after that."""
    if isinstance(model, COUNTING) and "clear_cache" not in vars(model):
        model.clear_cache = Cleared(model)
