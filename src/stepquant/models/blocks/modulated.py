"""Transformer blocks whose norms are scaled and shifted, and whose branches are gated, by what follows t."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import attention, attention_processor, embeddings, normalization
from diffusers.models import transformers as networks
from torch import nn

from stepquant.models.attention import given
from stepquant.models.blocks.transformer import is_plain_text_block

Flux, Wan, Qwen = networks.transformer_flux, networks.transformer_wan, networks.transformer_qwenimage
ZImage, Lumina2, Flux2 = (
    networks.transformer_z_image,
    networks.transformer_lumina2,
    networks.transformer_flux2,
)
Hunyuan, Hunyuan15 = networks.transformer_hunyuan_video, networks.transformer_hunyuan_video15
HunyuanImage, Bria, Chroma = (
    networks.transformer_hunyuanimage,
    networks.transformer_bria,
    networks.transformer_chroma,
)
SkyReels, LTX, Cosmos = (
    networks.transformer_skyreels_v2,
    networks.transformer_ltx,
    networks.transformer_cosmos,
)
CogVideoX, ConsisID = networks.cogvideox_transformer_3d, networks.consisid_transformer_3d
CogView4, CogView3 = networks.transformer_cogview4, networks.transformer_cogview3plus
AuraFlow, HunyuanDiT = networks.auraflow_transformer_2d, networks.hunyuan_transformer_2d
Sana, Krea2, Mochi = networks.sana_transformer, networks.transformer_krea2, networks.transformer_mochi


@dataclass(frozen=True)
class ModulatedBlock:
    """Kinds of one stream: 'zero' (DiT), 'single' (PixArt), 'places' (Allegro), 'float32' (Wan, SkyReels), 'controlled' (VACE),
    'root' (LTX), 'thrice' (Cosmos), 'bare' (video U-Nets), 'bare_turned' (Stable Audio), 'placed' (AnimateDiff), 'frames' (SVD),
    'start' (AuraFlow), 'shifted' (HunyuanDiT), 'image' (Sana), 'scale_first' and 'alone' (Krea 2), 'sandwich' (Z-Image),
    'zero_sandwich' (Lumina 2); of an image and a text: 'joint' (SD3, FLUX, Bria), 'joint_start' (AuraFlow), 'behind' (Hunyuan's),
    'pruned' (Chroma), 'given' (FLUX.2), 'named' (Qwen-Image), 'joint_sandwich' (Mochi); with one attention and one feed-forward
    for both: 'front' (CogVideoX, ConsisID), 'front_halves' (CogView 3), 'front_turns' (CogView 4); with a feed-forward beside the
    attention: 'wide' (FLUX, Bria), 'wide_behind' (Hunyuan's), 'wide_pruned' (Chroma), 'parallel' (FLUX.2).

    `attentions` run inside by themselves.
    """

    path: str
    kind: str
    attentions: tuple[str, ...]
    feeds: tuple[str, ...]
    unless: tuple[str, ...] = ("_chunk_size",)  # attributes that change what the block computes


# Processors that hand what they are given to the projections alone, and return what the last layer makes.
PLAIN = (
    attention_processor.AttnProcessor2_0,
    attention_processor.JointAttnProcessor2_0,
    Flux.FluxAttnProcessor,
    Wan.WanAttnProcessor,
    Qwen.QwenDoubleStreamAttnProcessor2_0,
    ZImage.ZSingleStreamAttnProcessor,
    Lumina2.Lumina2AttnProcessor2_0,
    Flux2.Flux2AttnProcessor,
    Flux2.Flux2ParallelSelfAttnProcessor,
    Hunyuan.HunyuanVideoAttnProcessor2_0,
    Hunyuan15.HunyuanVideo15AttnProcessor2_0,
    HunyuanImage.HunyuanImageAttnProcessor,
    Bria.BriaAttnProcessor,
    SkyReels.SkyReelsV2AttnProcessor,
    LTX.LTXVideoAttnProcessor,
    Cosmos.CosmosAttnProcessor2_0,
    attention_processor.AllegroAttnProcessor2_0,
    attention_processor.StableAudioAttnProcessor2_0,
    attention_processor.CogVideoXAttnProcessor2_0,
    CogView4.CogView4AttnProcessor,
    attention_processor.AuraFlowAttnProcessor2_0,
    attention_processor.HunyuanAttnProcessor2_0,
    attention_processor.MochiAttnProcessor2_0,
    attention_processor.SanaLinearAttnProcessor2_0,
    Sana.SanaAttnProcessor2_0,
    Krea2.Krea2AttnProcessor,
)
ATTENTIONS = ("attn", "attn1", "attn2", "attention")
FEEDS = ("ff_in", "ff", "ff_context", "ffn", "img_mlp", "txt_mlp", "feed_forward")
KINDS_BY_NORM = {"ada_norm_zero": "zero", "ada_norm_single": "single", "layer_norm": "bare"}
KINDS: dict[type[nn.Module], str] = {
    Flux.FluxTransformerBlock: "joint",
    Flux.FluxSingleTransformerBlock: "wide",
    Qwen.QwenImageTransformerBlock: "named",
    Flux2.Flux2TransformerBlock: "given",
    Flux2.Flux2SingleTransformerBlock: "parallel",
    Bria.BriaTransformerBlock: "joint",
    Bria.BriaSingleTransformerBlock: "wide",
    Chroma.ChromaTransformerBlock: "pruned",
    Chroma.ChromaSingleTransformerBlock: "wide_pruned",
    Hunyuan.HunyuanVideoTransformerBlock: "behind",
    Hunyuan.HunyuanVideoSingleTransformerBlock: "wide_behind",
    Hunyuan15.HunyuanVideo15TransformerBlock: "behind",
    HunyuanImage.HunyuanImageTransformerBlock: "behind",
    HunyuanImage.HunyuanImageSingleTransformerBlock: "wide_behind",
    Wan.WanTransformerBlock: "float32",
    SkyReels.SkyReelsV2TransformerBlock: "float32",
    networks.transformer_wan_vace.WanVACETransformerBlock: "controlled",
    LTX.LTXVideoTransformerBlock: "root",
    Cosmos.CosmosTransformerBlock: "thrice",
    networks.transformer_allegro.AllegroTransformerBlock: "places",
    networks.stable_audio_transformer.StableAudioDiTBlock: "bare_turned",
    ZImage.ZImageTransformerBlock: "sandwich",
    Lumina2.Lumina2TransformerBlock: "zero_sandwich",
    CogVideoX.CogVideoXBlock: "front",
    ConsisID.ConsisIDBlock: "front",
    CogView3.CogView3PlusTransformerBlock: "front_halves",
    CogView4.CogView4TransformerBlock: "front_turns",
    AuraFlow.AuraFlowJointTransformerBlock: "joint_start",
    AuraFlow.AuraFlowSingleTransformerBlock: "start",
    HunyuanDiT.HunyuanDiTBlock: "shifted",
    Sana.SanaTransformerBlock: "image",
    Krea2.Krea2TransformerBlock: "scale_first",
    Krea2.Krea2TextFusionBlock: "alone",
    Mochi.MochiTransformerBlock: "joint_sandwich",
    attention.TemporalBasicTransformerBlock: "frames",
}


def modulated_block(path: str, module: nn.Module) -> ModulatedBlock | None:
    """None for blocks of another kind."""
    kind = kind_of(module)
    if kind is None:
        return None
    names = tuple(name for name in ATTENTIONS if getattr(module, name, None) is not None)
    feeds = tuple(name for name in FEEDS if getattr(module, name, None) is not None)
    return (
        ModulatedBlock(path, kind, names, feeds)
        if all(is_open(getattr(module, name)) for name in names)
        else None
    )


def kind_of(module: nn.Module) -> str | None:
    if type(module) is attention.BasicTransformerBlock:
        kind = KINDS_BY_NORM.get(module.norm_type)
        placed = kind == "bare" and type(module.pos_embed) is embeddings.SinusoidalPositionalEmbedding
        kind = "placed" if placed else kind
        plain = (
            (placed or module.pos_embed is None)
            and not module.only_cross_attention
            and getattr(module, "fuser", None) is None
            and (kind != "zero" or module.attn2 is None)
            and not is_plain_text_block(module)  # which has a chain of its own
        )
        return kind if plain else None
    if type(module) is attention.JointTransformerBlock:
        known = (normalization.AdaLayerNormZero, normalization.AdaLayerNormContinuous)
        return "joint" if isinstance(module.norm1_context, known) else None
    return KINDS.get(type(module))


def is_open(attention: nn.Module) -> bool:
    """Whether nothing stands between what the attention is given and its projections, or behind its last layer."""
    return (
        type(given(attention.processor)) in PLAIN
        and getattr(attention, "group_norm", None) is None
        and getattr(attention, "spatial_norm", None) is None
        and getattr(attention, "norm_cross", None) is None
        and not getattr(attention, "residual_connection", False)
        and getattr(attention, "rescale_output_factor", 1.0) == 1.0
        and not getattr(attention, "fused_projections", False)
    )
