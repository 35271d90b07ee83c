"""Transformers over an image and a text, and their blocks."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import activations, attention
from diffusers.models.transformers import transformer_2d
from torch import nn

from stepquant.models.blocks.attention import is_bare_attention


@dataclass(frozen=True)
class ImageTransformer:
    """Group norm -> proj_in -> blocks over the pixels of an image -> proj_out (+ input)."""

    path: str
    linear: bool  # the projections are linears over pixels, otherwise convolutions over the image


@dataclass(frozen=True)
class TextBlock:
    """Layer norm -> self-attention (+ input), layer norm -> attention to a text (+), layer norm -> GEGLU -> out (+)."""

    path: str
    heads: tuple[int, int]  # of the first and of the second attention
    unless: tuple[str, ...] = (
        "_chunk_size",
    )  # attributes that change what the block computes once they are set


def is_plain_transformer(module: nn.Module) -> bool:
    return (
        type(module) is transformer_2d.Transformer2DModel
        and bool(module.is_input_continuous)
        and type(module.norm) is nn.GroupNorm
    )


def image_transformer(path: str, module: nn.Module) -> ImageTransformer:
    return ImageTransformer(path, linear=bool(module.use_linear_projection))


def is_plain_text_block(module: nn.Module) -> bool:
    return (
        type(module) is attention.BasicTransformerBlock
        and module.norm_type == "layer_norm"
        and module.pos_embed is None
        and not module.only_cross_attention
        and all(type(norm) is nn.LayerNorm for norm in (module.norm1, module.norm2, module.norm3))
        and is_bare_attention(module.attn1)
        and is_bare_attention(module.attn2)
        and not module.attn1.is_cross_attention
        and bool(module.attn2.is_cross_attention)  # type: ignore[union-attr]
        and type(module.ff) is attention.FeedForward
        and [type(part) for part in module.ff.net][:2] == [activations.GEGLU, nn.Dropout]
        and all(type(part) is nn.Dropout for part in module.ff.net[3:])
    )


def text_block(path: str, module: nn.Module) -> TextBlock:
    return TextBlock(path, (int(module.attn1.heads), int(module.attn2.heads)))  # type: ignore[union-attr, arg-type]
