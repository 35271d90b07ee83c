"""Attention whose queries and keys are normed, and turned by the angles of their places, before they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffusers.models import attention_processor, normalization
from diffusers.models import transformers as networks
from torch import nn

from stepquant.models.attention import given
from stepquant.models.blocks.joined import JoinedAttention, has
from stepquant.models.blocks.root_norm import is_plain_root_norm


@dataclass(frozen=True)
class Rotary:
    """How a processor turns and joins: `angles` is its argument, which holds pairs of cosines and sines, or complex numbers.

    The channels of a pair are neighbours, or lie half a head apart where `halves`. `joint`: a text is joined before the
    product, behind the image or in front of it; `apart`: which comes with angles of its own, or `image`: is not turned.
    `merged`: where it has no projections of its own, it is joined before them. `text_mask` is an argument, too: which tokens
    of the text there are. `crossing`: keys of a text that is not joined are not turned.
    """

    angles: str | None
    halves: bool = False
    joint: str = ""  # "", "front" or "behind"
    apart: bool = False
    image: bool = False
    merged: bool = False
    text_mask: str | None = None
    across: bool = False  # one norm over all heads of a token
    wide: bool = False  # angles of all channels of a token, each head with its own
    crossing: bool = False
    gated: bool = False  # what is read is multiplied by the sigmoid of what another projection makes


@dataclass(frozen=True)
class RotaryAttention(JoinedAttention):
    rotary: Rotary
    heads: int


@dataclass(frozen=True)
class ParallelAttention:
    """Beside a feed-forward: one layer makes queries, keys, values and what is activated, another reads both results."""

    path: str


HUNYUAN = Rotary("image_rotary_emb", joint="behind", image=True, merged=True)
COGVIDEOX = Rotary("image_rotary_emb", joint="front", image=True, merged=True)
ROTARY: dict[type, Rotary] = {
    attention_processor.JointAttnProcessor2_0: Rotary(None, joint="behind"),
    networks.transformer_flux.FluxAttnProcessor: Rotary("image_rotary_emb", joint="front"),
    networks.transformer_flux2.Flux2AttnProcessor: Rotary("image_rotary_emb", joint="front"),
    networks.transformer_flux3.Flux3AttnProcessor: Rotary("image_rotary_emb"),
    networks.transformer_bria.BriaAttnProcessor: Rotary("image_rotary_emb", joint="front"),
    networks.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0: HUNYUAN,
    networks.transformer_hunyuanimage.HunyuanImageAttnProcessor: HUNYUAN,
    networks.transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0: replace(
        HUNYUAN, merged=False, text_mask="attention_mask"
    ),
    networks.transformer_ltx.LTXVideoAttnProcessor: Rotary("image_rotary_emb", across=True, wide=True),
    networks.transformer_lumina2.Lumina2AttnProcessor2_0: Rotary("image_rotary_emb"),
    networks.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0: Rotary(
        "image_rotary_emb", joint="front", apart=True, text_mask="encoder_hidden_states_mask"
    ),
    networks.transformer_wan.WanAttnProcessor: Rotary("rotary_emb", across=True),
    networks.transformer_skyreels_v2.SkyReelsV2AttnProcessor: Rotary("rotary_emb", across=True),
    networks.transformer_z_image.ZSingleStreamAttnProcessor: Rotary("freqs_cis"),
    networks.transformer_cosmos.CosmosAttnProcessor2_0: Rotary("image_rotary_emb", halves=True),
    attention_processor.CogVideoXAttnProcessor2_0: COGVIDEOX,
    networks.transformer_cogview4.CogView4AttnProcessor: replace(COGVIDEOX, halves=True),
    attention_processor.AuraFlowAttnProcessor2_0: Rotary(None, joint="front"),
    attention_processor.HunyuanAttnProcessor2_0: Rotary("image_rotary_emb", crossing=True),
    networks.transformer_krea2.Krea2AttnProcessor: Rotary("image_rotary_emb", gated=True),
}
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


PARALLEL = networks.transformer_flux2.Flux2ParallelSelfAttnProcessor


def parallel_attention(path: str, module: nn.Module) -> ParallelAttention | None:
    """None for everything else."""
    if type(given(getattr(module, "processor", None))) is not PARALLEL:
        return None
    normed = (is_plain_root_norm(module.get_submodule(name)) for name in ("norm_q", "norm_k"))
    return ParallelAttention(path) if all(normed) else None


def rotary_attention(module: nn.Module, joined: JoinedAttention) -> RotaryAttention | None:
    """None for processors of another kind, and where queries or keys have no norm."""
    rotary = ROTARY.get(type(given(getattr(module, "processor", None))))
    if rotary is None or not joined.groups:
        return None
    added = [name for name in ADDED if has(module, name)]
    joint = rotary.joint and len(added) == len(ADDED)
    norms = ["norm_q", "norm_k", *(added[3:] if joint else ())]
    normed = all(has(module, name) and is_norm(module.get_submodule(name), rotary) for name in norms)
    complete = (not added or joint) and not getattr(module, "fused_projections", False)
    heads = int(getattr(module, "heads", 0) or getattr(module, "num_heads", 0))
    if not normed or not complete or not heads:
        return None
    own = replace(rotary, merged=rotary.merged and not added)
    return RotaryAttention(joined.path, joined.groups, joined.ends, own, heads)


def is_norm(norm: nn.Module, rotary: Rotary) -> bool:
    """An RMS norm, or a layer norm of each head."""
    layer = isinstance(norm, nn.LayerNorm) and type(norm) in (nn.LayerNorm, normalization.FP32LayerNorm)
    return is_plain_root_norm(norm) or (layer and not rotary.across)
