"""Transformers over videos, whose text is attended to or runs beside the frames."""

from __future__ import annotations

from stepquant.models.families.family import Family, children_of, joined

FAMILIES = (
    Family(
        models=("WanTransformer3DModel",),
        x="hidden_states",
        top={
            "patch_embedding": "stem",
            "proj_out": "head",
            "condition_embedder.time_embedder.linear_*": "time",
            "condition_embedder.time_proj": "modulate",
            "condition_embedder.text_embedder.linear_*": "context",
        },
        blocks=children_of("blocks"),
        text=("encoder_hidden_states", "encoder_hidden_states_image"),
        guidance="cond; uncond",
        shared=("attention_kwargs",),
    ),
    Family(
        models=("CogVideoXTransformer3DModel",),
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
)
