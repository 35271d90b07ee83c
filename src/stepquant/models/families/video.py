"""Transformers over videos, whose text is attended to or runs beside the frames."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from stepquant.models.families.family import Family, children_of, joined, taking_turns

WAN = {
    "patch_embedding": "stem",
    "proj_out": "head",
    "condition_embedder.time_embedder.linear_*": "time",
    "condition_embedder.time_proj": "modulate",
    "condition_embedder.text_embedder.linear_*": "context",
}
IMAGE = "condition_embedder.image_embedder"  # of a first frame that is given


def after_image(*paths: str) -> Callable[[nn.Module], list[str]]:
    """The blocks in these lists, behind what embeds an image where the model takes one."""

    def blocks(model: nn.Module) -> list[str]:
        first = [IMAGE] if IMAGE in dict(model.named_modules()) else []
        return first + children_of(*paths)(model)

    return blocks


FAMILIES = (
    Family(
        models=("WanTransformer3DModel", "SkyReelsV2Transformer3DModel"),
        x="hidden_states",
        top=WAN,
        blocks=after_image("blocks"),
        prompt_blocks=(IMAGE,),
        text=("encoder_hidden_states", "encoder_hidden_states_image"),
        guidance="cond; uncond",
        shared=("attention_kwargs",),
    ),
    Family(
        models=("CosmosTransformer3DModel",),
        x="hidden_states",
        top={
            "patch_embed.proj": "stem",
            "proj_out": "head",
            "time_embed.t_embedder.linear_*": "time",
            "crossattn_proj.0": "context",
            "img_context_proj.0": "context",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states", "attention_mask"),
        guidance="cond; uncond",
        shared=("fps", "padding_mask"),
    ),
    Family(
        models=("CogVideoXTransformer3DModel",),
        channels=2,
        x="hidden_states",
        top={
            "patch_embed.proj": "stem",
            "patch_embed.text_proj": "context",
            "proj_out": "head",
            "time_embedding.linear_*": "time",
            "ofs_embedding.linear_*": "cond",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states",),
        cond=("ofs",),
        shared=("image_rotary_emb", "attention_kwargs"),
    ),
    Family(
        models=("LTXVideoTransformer3DModel",),
        channels=-1,
        x="hidden_states",
        top={
            "proj_in": "stem",
            "proj_out": "head",
            "time_embed.emb.timestep_embedder.linear_*": "time",
            "caption_projection.linear_*": "context",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        shared=("num_frames", "height", "width", "rope_interpolation_scale", "attention_kwargs"),
    ),
    Family(
        models=("HunyuanVideoTransformer3DModel",),
        x="hidden_states",
        top={
            "x_embedder.proj": "stem",
            "proj_out": "head",
            "time_text_embed.timestep_embedder.linear_*": "time",
            "time_text_embed.guidance_embedder.linear_*": "cond",
            "time_text_embed.text_embedder.linear_*": "cond",
            "context_embedder.time_text_embed.timestep_embedder.linear_*": "time",
            "context_embedder.time_text_embed.text_embedder.linear_*": "context",
            "context_embedder.proj_in": "context",
        },
        blocks=children_of(
            "context_embedder.token_refiner.refiner_blocks", "transformer_blocks", "single_transformer_blocks"
        ),
        prompt_blocks=("context_embedder.token_refiner.refiner_blocks",),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        cond=("pooled_projections", "guidance"),
        guidance="cond; uncond",
        shared=("attention_kwargs",),
        concats=joined("single_transformer_blocks.*.proj_out"),
    ),
    Family(
        models=("WanVACETransformer3DModel",),
        x="hidden_states",
        top={**WAN, "vace_patch_embedding": "stem"},
        blocks=after_image("vace_blocks", "blocks"),
        prompt_blocks=(IMAGE,),
        text=("encoder_hidden_states", "encoder_hidden_states_image"),
        guidance="cond; uncond",
        shared=("control_hidden_states_scale", "attention_kwargs"),
    ),
    Family(
        models=("HunyuanVideo15Transformer3DModel",),
        x="hidden_states",
        top={
            "x_embedder.proj": "stem",
            "proj_out": "head",
            "time_embed.timestep_embedder.linear_*": "time",
            "time_embed.timestep_embedder_r.linear_*": "cond",
            "context_embedder.time_text_embed.timestep_embedder.linear_*": "time",
            "context_embedder.time_text_embed.text_embedder.linear_*": "context",
            "context_embedder.proj_in": "context",
            "context_embedder_2.linear_*": "context",
            "image_embedder.linear_*": "context",
        },
        blocks=children_of("context_embedder.token_refiner.refiner_blocks", "transformer_blocks"),
        prompt_blocks=("context_embedder.token_refiner.refiner_blocks",),
        text=(
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
            "image_embeds",
        ),
        cond=("timestep_r",),
        guidance="cond; uncond",
        shared=("attention_kwargs",),
    ),
    Family(
        models=("MochiTransformer3DModel",),
        x="hidden_states",
        top={
            "patch_embed.proj": "stem",
            "proj_out": "head",
            "time_embed.timestep_embedder.linear_*": "time",
            "time_embed.pooler.to_*": "cond",
            "time_embed.caption_proj": "context",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        shared=("attention_kwargs",),
    ),
    Family(
        models=("AllegroTransformer3DModel",),
        x="hidden_states",
        top={
            "pos_embed.proj": "stem",
            "proj_out": "head",
            "adaln_single.emb.timestep_embedder.linear_*": "time",
            "caption_projection.linear_*": "context",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        shared=("image_rotary_emb",),
    ),
    Family(
        models=("LatteTransformer3DModel",),
        x="hidden_states",
        top={
            "pos_embed.proj": "stem",
            "proj_out": "head",
            "adaln_single.emb.timestep_embedder.linear_*": "time",
            "caption_projection.linear_*": "context",
        },
        blocks=taking_turns("transformer_blocks", "temporal_transformer_blocks"),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        shared=("enable_temporal_attentions",),
    ),
    Family(
        models=("SanaVideoTransformer3DModel",),
        x="hidden_states",
        top={
            "patch_embedding": "stem",
            "proj_out": "head",
            "time_embed.emb.timestep_embedder.linear_*": "time",
            "time_embed.timestep_embedder.linear_*": "time",
            "time_embed.guidance_embedder.linear_*": "cond",
            "caption_projection.linear_*": "context",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        cond=("guidance",),
        shared=("attention_kwargs",),
    ),
)
