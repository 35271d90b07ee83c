"""Structure: the chains of a model that may run as one, by module path; declared here, never guessed while running."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.unets import unet_2d_condition
from torch import nn

from stepquant.models.blocks.attention import AttentionBlock, attention_block, is_plain_attention
from stepquant.models.blocks.feed import Feed, ImageFeed, feed, image_feed
from stepquant.models.blocks.joined import JoinedAttention, joined_attention, linear_attention
from stepquant.models.blocks.modulated import ModulatedBlock, modulated_block
from stepquant.models.blocks.resampling import Resampler, is_plain_resampler, resampler
from stepquant.models.blocks.residual import ResidualBlock, is_plain_residual, residual_block
from stepquant.models.blocks.root_norm import RootNorm, is_plain_root_norm, root_norm
from stepquant.models.blocks.rotary import ParallelAttention, parallel_attention, rotary_attention
from stepquant.models.blocks.text_feed import TextFeed, is_text_feed, text_feed
from stepquant.models.blocks.transformer import (
    ImageTransformer,
    TextBlock,
    image_transformer,
    is_plain_text_block,
    is_plain_transformer,
    text_block,
)
from stepquant.models.blocks.up import UpBlock, is_plain_up_block, up_block
from stepquant.models.families.family import matches
from stepquant.models.families.registry import family_of, top_of
from stepquant.models.families.roles import part_roles


@dataclass(frozen=True)
class Structure:
    """All chains of one model. `tails` are norm -> SiLU -> head; `time` is projection -> embedding of t alone.

    `text` is the argument that reaches every text block as it is.
    """

    residuals: tuple[ResidualBlock, ...] = ()
    attentions: tuple[AttentionBlock, ...] = ()
    transformers: tuple[ImageTransformer, ...] = ()
    text_blocks: tuple[TextBlock, ...] = ()
    resamplers: tuple[Resampler, ...] = ()
    up_blocks: tuple[UpBlock, ...] = ()
    joined: tuple[JoinedAttention, ...] = ()
    parallel: tuple[ParallelAttention, ...] = ()
    feeds: tuple[Feed, ...] = ()
    image_feeds: tuple[ImageFeed, ...] = ()
    text_feeds: tuple[TextFeed, ...] = ()
    modulated: tuple[ModulatedBlock, ...] = ()
    root_norms: tuple[RootNorm, ...] = ()
    tails: tuple[tuple[str, str, str], ...] = ()
    time: tuple[str, str] | None = None
    text: str | None = None

    def time_layers(self) -> list[str]:
        """The layers between the time projection and what each residual block adds."""
        if self.time is None:
            return []
        embedding = [f"{self.time[1]}.linear_1", f"{self.time[1]}.linear_2"]
        return embedding + [f"{block.path}.time_emb_proj" for block in self.residuals if block.timed]


def structure(model: nn.Module) -> Structure:
    """What of `model` fits the chains above; blocks that differ in any way are left out."""
    named = [(path, module) for path, module in model.named_modules() if path]
    text_blocks = tuple(text_block(p, m) for p, m in named if is_plain_text_block(m))
    fused = tuple(f"{block.path}." for block in text_blocks)
    parts = [(p, m) for p, m in named if not p.startswith(fused) and not is_plain_attention(m)]
    return Structure(
        residuals=tuple(residual_block(p, m) for p, m in named if is_plain_residual(m)),
        attentions=tuple(attention_block(p, m) for p, m in named if is_plain_attention(m)),
        transformers=tuple(image_transformer(p, m) for p, m in named if is_plain_transformer(m)),
        text_blocks=text_blocks,
        resamplers=tuple(resampler(p, m) for p, m in named if is_plain_resampler(m)),
        up_blocks=tuple(up_block(p, m) for p, m in named if is_plain_up_block(m)),
        joined=tuple(
            rotary_attention(m, one) or linear_attention(m, one) or one
            for p, m in parts
            if (one := joined_attention(p, m)) is not None
        ),
        parallel=tuple(filter(None, (parallel_attention(p, m) for p, m in parts))),
        feeds=tuple(filter(None, (feed(p, m) for p, m in parts))),
        image_feeds=tuple(filter(None, (image_feed(p, m) for p, m in parts))),
        text_feeds=tuple(text_feed(p, m) for p, m in named if is_text_feed(m)),
        modulated=tuple(filter(None, (modulated_block(p, m) for p, m in parts))),
        root_norms=tuple(root_norm(p, m) for p, m in named if is_plain_root_norm(m)),
        tails=tuple(filter(None, (tail(p, m) for p, m in model.named_modules()))),
        time=time_path(model),
        text=text_argument(model),
    )


def roles(model: nn.Module) -> dict[str, str]:
    """Path -> role wherever a declaration names one; unlike `Denoiser.sites` also when layers were replaced."""
    paths = {path for path, _ in model.named_modules()}
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        found |= {f"{path}.{child}" if path else child: role for child, role in part_roles(module).items()}
    found |= {
        path: role for pattern, role in top_of(model).items() for path in paths if matches(pattern, path)
    }
    halves = {f"{path}.{half}": role for path, role in found.items() for half in (0, 1)}
    return {path: role for path, role in (found | halves).items() if path in paths}


def tail(path: str, module: nn.Module) -> tuple[str, str, str] | None:
    names = ("conv_norm_out", "conv_act", "conv_out")
    norm, activation, head = (getattr(module, name, None) for name in names)
    if not (isinstance(norm, nn.GroupNorm) and isinstance(activation, nn.SiLU) and head is not None):
        return None
    first, second, last = (f"{path}.{name}" if path else name for name in names)
    return first, second, last


def time_path(model: nn.Module) -> tuple[str, str] | None:
    names = ("time_proj", "time_embedding")
    return names if all(isinstance(getattr(model, name, None), nn.Module) for name in names) else None


def text_argument(model: nn.Module) -> str | None:
    """The argument that every text block reads unchanged."""
    plain = type(model) is unet_2d_condition.UNet2DConditionModel and model.encoder_hid_proj is None
    return family_of(model).text[0] if plain else None
