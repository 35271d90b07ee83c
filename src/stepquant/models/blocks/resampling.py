"""Convolutions that double or halve an image."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import downsampling, upsampling
from torch import nn


@dataclass(frozen=True)
class Resampler:
    """A convolution that reads the raw stream, before which pixels are doubled or a border is added."""

    path: str
    doubles: bool
    border: tuple[int, int, int, int] | None = (
        None  # left, right, top, bottom, where the convolution has none
    )


def is_plain_resampler(module: nn.Module) -> bool:
    if type(module) is upsampling.Upsample2D:
        return bool(
            module.norm is None
            and module.use_conv
            and module.interpolate
            and not module.use_conv_transpose
            and module.name == "conv"
        )
    return type(module) is downsampling.Downsample2D and module.norm is None and bool(module.use_conv)


def resampler(path: str, module: nn.Module) -> Resampler:
    doubles = type(module) is upsampling.Upsample2D
    return Resampler(path, doubles, (0, 1, 0, 1) if not doubles and module.padding == 0 else None)
