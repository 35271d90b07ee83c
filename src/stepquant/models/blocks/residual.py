"""Residual blocks of U-Nets."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import resnet
from torch import nn


@dataclass(frozen=True)
class ResidualBlock:
    """norm1 -> SiLU -> conv1 (+ time) -> norm2 -> SiLU -> conv2 (+ shortcut or input), divided by `divisor`."""

    path: str
    divisor: float
    timed: bool  # adds SiLU -> time_emb_proj to what conv1 returns
    shortcut: bool  # a convolution reads the raw input; otherwise the input itself is added
    width: int  # channels that the time embedding becomes


def is_plain_residual(module: nn.Module) -> bool:
    return (
        type(module) is resnet.ResnetBlock2D
        and module.upsample is None
        and module.downsample is None
        and isinstance(module.nonlinearity, nn.SiLU)
        and (module.time_embedding_norm == "default" or is_timeless(module))
        and not (module.skip_time_act and module.time_emb_proj is not None)
    )


def is_timeless(module: nn.Module) -> bool:
    """Whether its second norm is an ordinary one, which autoencoders say by the name of its kind."""
    return module.time_emb_proj is None and module.time_embedding_norm == "group"


def residual_block(path: str, module: nn.Module) -> ResidualBlock:
    timed, shortcut = module.time_emb_proj is not None, module.conv_shortcut is not None
    width = int(module.out_channels)  # type: ignore[arg-type]
    return ResidualBlock(path, float(module.output_scale_factor), timed, shortcut, width)  # type: ignore[arg-type]
