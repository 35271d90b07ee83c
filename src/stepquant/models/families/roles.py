"""Parts: the role of every convolution and linear inside diffusers' building blocks, declared once.

Keyed by class object: diffusers uses some class names twice.
"""

from __future__ import annotations

from typing import Any

from diffusers.models import (
    attention,
    attention_processor,
    downsampling,
    embeddings,
    normalization,
    resnet,
    upsampling,
)
from diffusers.models import transformers as networks
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.autoencoders import autoencoder_kl_qwenimage, autoencoder_kl_wan
from diffusers.models.transformers import transformer_2d, transformer_temporal
from diffusers.models.unets import unet_1d_blocks, unet_2d, unet_2d_condition, unet_motion_model
from torch import nn

from stepquant.models.causal import CAUSAL

LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)

OUT = {"to_q": "q", "to_out.0": "attn_out"}
ADDED = {
    "add_q_proj": "q_added",
    "add_k_proj": "k_added",
    "add_v_proj": "v_added",
    "to_add_out": "attn_out_added",
}
ATTENTION = OUT | {"to_k": "k", "to_v": "v"} | ADDED
FEED = {"net.0.proj": "ff_in", "net.2": "ff_out"}
IMAGE_FEED = {"conv_inverted": "ff_in", "conv_depth": "depthwise", "conv_point": "ff_out"}
RESIDUAL = {"conv1": "conv", "conv2": "conv", "time_emb_proj": "modulate", "conv_shortcut": "shortcut"}
ENDS = {"proj_in": "proj_in", "proj_out": "proj_out"}
SINGLE = {"proj_mlp": "ff_in", "proj_out": "ff_out"}  # a feed-forward beside an attention, joined at its end
SELF_AND_CROSS = {"attn1.to_k": "k", "attn1.to_v": "v", "attn2.to_k": "k_text", "attn2.to_v": "v_text"}


def each(roles: dict[str, str], *kinds: type[nn.Module]) -> dict[type[nn.Module], dict[str, str]]:
    return dict.fromkeys(kinds, roles)


PARTS: dict[type[nn.Module], dict[str, str]] = {
    **each(
        ATTENTION,
        attention_processor.Attention,
        networks.transformer_flux.FluxAttention,
        networks.transformer_flux2.Flux2Attention,
        networks.transformer_wan.WanAttention,
        networks.transformer_skyreels_v2.SkyReelsV2Attention,
        networks.transformer_bria.BriaAttention,
        attention_processor.MochiAttention,
    ),
    # The gate multiplies what attention returns, and reads what the queries read.
    networks.transformer_krea2.Krea2Attention: ATTENTION | {"to_gate": "q"},
    networks.transformer_ltx.LTXAttention: OUT,
    networks.transformer_cosmos.CosmosAttention: ATTENTION
    | {"q_img": "q", "k_img": "k_text", "v_img": "v_text"},
    networks.transformer_ltx.LTXVideoTransformerBlock: SELF_AND_CROSS,
    networks.transformer_flux2.Flux2ParallelSelfAttention: {
        "to_qkv_mlp_proj": "qkv_ff_in",
        "to_out": "ff_out",
    },
    unet_1d_blocks.SelfAttention1d: {"query": "q", "key": "k", "value": "v", "proj_attn": "attn_out"},
    # Feed-forwards
    **each(FEED, attention.FeedForward),
    attention.LuminaFeedForward: {"linear_1": "ff_in", "linear_3": "ff_in", "linear_2": "ff_out"},
    networks.sana_transformer.GLUMBConv: IMAGE_FEED,
    networks.transformer_sana_video.GLUMBTempConv: IMAGE_FEED | {"conv_temp": "conv"},
    networks.transformer_flux2.Flux2FeedForward: {"linear_in": "ff_in", "linear_out": "ff_out"},
    networks.auraflow_transformer_2d.AuraFlowFeedForward: {
        "linear_1": "ff_in",
        "linear_2": "ff_in",
        "out_projection": "ff_out",
    },
    networks.transformer_krea2.Krea2SwiGLU: {"gate": "ff_in", "up": "ff_in", "down": "ff_out"},
    networks.transformer_z_image.FeedForward: {"w1": "ff_in", "w3": "ff_in", "w2": "ff_out"},
    **each(
        SINGLE,
        networks.transformer_bria.BriaSingleTransformerBlock,
        networks.transformer_chroma.ChromaSingleTransformerBlock,
        networks.transformer_flux.FluxSingleTransformerBlock,
        networks.transformer_hunyuanimage.HunyuanImageSingleTransformerBlock,
        networks.transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock,
    ),
    # Residual blocks and resampling
    **each(RESIDUAL, resnet.ResnetBlock2D, resnet.TemporalResnetBlock),
    resnet.TemporalConvLayer: dict.fromkeys(("conv1.2", "conv2.3", "conv3.3", "conv4.3"), "conv"),
    unet_1d_blocks.ResConvBlock: {"conv_1": "conv", "conv_2": "conv", "conv_skip": "shortcut"},
    resnet.ResidualTemporalBlock1D: {
        "conv_in.conv1d": "conv",
        "conv_out.conv1d": "conv",
        "time_emb": "modulate",
        "residual_conv": "shortcut",
    },
    **each({"conv": "down"}, downsampling.Downsample2D, downsampling.Downsample1D),
    **each({"conv": "up"}, upsampling.Upsample2D, upsampling.Upsample1D),
    **each(
        ENDS,
        transformer_2d.Transformer2DModel,
        transformer_temporal.TransformerTemporalModel,
        transformer_temporal.TransformerSpatioTemporalModel,
        unet_motion_model.AnimateDiffTransformer3D,
        networks.transformer_wan_vace.WanVACETransformerBlock,
    ),
    networks.hunyuan_transformer_2d.HunyuanDiTBlock: {"skip_linear": "skip"},
    # Modulation
    **each(
        {"linear": "modulate"},
        normalization.AdaLayerNorm,
        normalization.AdaLayerNormContinuous,
        normalization.AdaLayerNormSingle,
        normalization.AdaLayerNormZero,
        normalization.AdaLayerNormZeroSingle,
        normalization.CogVideoXLayerNormZero,
        normalization.LuminaRMSNormZero,
        normalization.SD35AdaLayerNormZeroX,
        normalization.CogView3PlusAdaLayerNormZeroTextImage,
        networks.auraflow_transformer_2d.AuraFlowPreFinalBlock,
        networks.hunyuan_transformer_2d.AdaLayerNormShift,
        networks.transformer_cogview4.CogView4AdaLayerNormContinuous,
        networks.transformer_cogview4.CogView4AdaLayerNormZero,
        networks.transformer_flux2.Flux2Modulation,
        networks.transformer_hunyuan_video.HunyuanVideoAdaNorm,
        networks.transformer_hunyuan_video15.HunyuanVideo15AdaNorm,
        networks.transformer_hunyuanimage.HunyuanImageAdaNorm,
        networks.transformer_mochi.MochiRMSNormZero,
        networks.sana_transformer.SanaCombinedTimestepGuidanceEmbeddings,
        networks.transformer_sana_video.SanaCombinedTimestepGuidanceEmbeddings,
    ),
    networks.transformer_mochi.MochiLayerNormContinuous: {"linear_1": "modulate"},
    **each(
        {"linear_1": "modulate", "linear_2": "modulate"},
        networks.transformer_cosmos.CosmosAdaLayerNorm,
        networks.transformer_cosmos.CosmosAdaLayerNormZero,
    ),
    networks.transformer_qwenimage.QwenImageTransformerBlock: {
        "img_mod.1": "modulate",
        "txt_mod.1": "modulate",
    },
    networks.transformer_z_image.ZImageTransformerBlock: {"adaLN_modulation.0": "modulate"},
}

# Children that may be tables, whose rows a label or a token chooses.
TABLES: dict[type[nn.Module], dict[str, str]] = {
    embeddings.LabelEmbedding: {"embedding_table": "cond"},
    unet_2d.UNet2DModel: {"class_embedding": "cond"},
    unet_2d_condition.UNet2DConditionModel: {"class_embedding": "cond"},
}
# Of transformers, which need not be there; T5's tokens are a table of two modules, and stay float.
TABLES_OF_TEXTS = {"CLIPTextEmbeddings": {"token_embedding": "context"}}

# Attentions without a processor, whose forward calls the function that multiplies.
WRITTEN_OUT = (autoencoder_kl_wan.WanAttentionBlock, autoencoder_kl_qwenimage.QwenImageAttentionBlock)
PRODUCTS: tuple[Any, ...] = (
    attention_processor.Attention,
    AttentionModuleMixin,
    unet_1d_blocks.SelfAttention1d,
    *WRITTEN_OUT,
)

OWN_WAY = "its class computes in a way of its own, which no integer layer knows"
ORDINARY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

LINEAR = "linear attention has no probabilities, and sums in float32"
# Why some layers and attention products have no integer form, by their class or that of their processor.
FLOAT: dict[type, str] = {
    nn.ConvTranspose1d: "no integer kernel for transposed convolutions",
    attention_processor.SanaLinearAttnProcessor2_0: LINEAR,
    networks.transformer_sana_video.SanaLinearAttnProcessor3_0: LINEAR,
    unet_1d_blocks.SelfAttention1d: "its class multiplies by itself, without a function that could be exchanged",
}


def computes_its_own_way(layer: nn.Module) -> bool:
    """Whether its class does something else than what it is derived from."""
    ordinary = any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in ORDINARY)
    return not ordinary and not isinstance(layer, CAUSAL)


def embeddings_in(model: nn.Module) -> dict[str, str]:
    """Path -> role of the tables of a model."""
    return {
        f"{name}.{child}".removeprefix("."): role
        for name, module in model.named_modules()
        for child, role in (
            TABLES.get(type(module)) or TABLES_OF_TEXTS.get(type(module).__name__, {})
        ).items()
        if type(getattr(module, child)) is nn.Embedding
    }


def part_roles(module: nn.Module) -> dict[str, str]:
    """Child path -> role for the leaves that `module` owns, itself a building block."""
    roles = dict(PARTS.get(type(module), {}))
    if not isinstance(module, PRODUCTS):
        return roles
    of_unets = isinstance(module, attention_processor.Attention)
    beside = of_unets and getattr(module, "added_kv_proj_dim", None) is not None
    if getattr(module, "is_cross_attention", False) and not beside and "to_k" in roles:
        roles |= {"to_k": "k_text", "to_v": "v_text"}
    if (
        getattr(module, "add_q_proj", None) is None and "add_k_proj" in roles
    ):  # text keys beside the image's own
        roles |= {"add_k_proj": "k_text", "add_v_proj": "v_text"}
    return roles
