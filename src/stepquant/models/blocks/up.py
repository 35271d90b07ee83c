"""Up blocks of U-Nets, which read what the way down has left for them."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import upsampling
from diffusers.models.unets import unet_2d_blocks
from torch import nn


@dataclass(frozen=True)
class UpBlock:
    """Residual blocks that each read a concatenation with a skip, an attention block behind each, then upsamplers."""

    path: str
    residuals: tuple[str, ...]
    attentions: tuple[str | None, ...]
    upsamplers: tuple[str, ...]
    sized: bool  # hands the upsampler a size
    textual: bool  # hands the attention blocks a text
    unless: tuple[str, ...] = ()  # attributes that change what the block computes once they are set


FREE_U = ("s1", "s2", "b1", "b2")
UP_BLOCKS: dict[type[nn.Module], tuple[str, ...]] = {
    unet_2d_blocks.UpBlock2D: FREE_U,
    unet_2d_blocks.CrossAttnUpBlock2D: FREE_U,
    unet_2d_blocks.AttnUpBlock2D: (),
}


def is_plain_up_block(module: nn.Module) -> bool:
    if type(module) not in UP_BLOCKS:
        return False
    return all(type(upsampler) is upsampling.Upsample2D for upsampler in module.upsamplers or ())  # type: ignore[union-attr]


def up_block(path: str, module: nn.Module) -> UpBlock:
    residuals, attentions, upsamplers = (
        tuple(f"{path}.{kind}.{i}" for i in range(len(getattr(module, kind, None) or ())))
        for kind in ("resnets", "attentions", "upsamplers")
    )
    kind = type(module)
    return UpBlock(
        path,
        residuals,
        attentions or (None,) * len(residuals),
        upsamplers,
        sized=kind is not unet_2d_blocks.AttnUpBlock2D,
        textual=kind is unet_2d_blocks.CrossAttnUpBlock2D,
        unless=UP_BLOCKS[kind],
    )
