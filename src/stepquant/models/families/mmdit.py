"""Transformers over images in which a stream of text runs beside the image (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

from stepquant.models.families.family import Family, children_of, joined

FAMILIES = (
    Family(
        models=("SD3Transformer2DModel",),
        x="hidden_states",
        top={
            "pos_embed.proj": "stem",
            "proj_out": "head",
            "time_text_embed.timestep_embedder.linear_*": "time",
            "time_text_embed.text_embedder.linear_*": "cond",
            "context_embedder": "context",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states",),
        cond=("pooled_projections",),
        shared=("joint_attention_kwargs", "skip_layers"),
    ),
    Family(
        models=("FluxTransformer2DModel",),
        x="hidden_states",
        top={
            "x_embedder": "stem",
            "proj_out": "head",
            "time_text_embed.timestep_embedder.linear_*": "time",
            "time_text_embed.guidance_embedder.linear_*": "cond",
            "time_text_embed.text_embedder.linear_*": "cond",
            "context_embedder": "context",
        },
        blocks=children_of("transformer_blocks", "single_transformer_blocks"),
        text=("encoder_hidden_states",),
        cond=("pooled_projections", "guidance"),
        guidance="cond; uncond",
        shared=("img_ids", "txt_ids", "joint_attention_kwargs"),
        concats=joined("single_transformer_blocks.*.proj_out"),
    ),
    Family(
        models=("Flux2Transformer2DModel",),
        x="hidden_states",
        top={
            "x_embedder": "stem",
            "proj_out": "head",
            "time_guidance_embed.timestep_embedder.linear_*": "time",
            "time_guidance_embed.guidance_embedder.linear_*": "cond",
            "context_embedder": "context",
        },
        blocks=children_of("transformer_blocks", "single_transformer_blocks"),
        text=("encoder_hidden_states",),
        cond=("guidance",),
        guidance="cond; uncond",
        shared=("img_ids", "txt_ids", "joint_attention_kwargs"),
        concats=joined("single_transformer_blocks.*.attn.to_out"),
    ),
    Family(
        models=("QwenImageTransformer2DModel",),
        x="hidden_states",
        top={
            "img_in": "stem",
            "txt_in": "context",
            "proj_out": "head",
            "time_text_embed.timestep_embedder.linear_*": "time",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states", "encoder_hidden_states_mask"),
        guidance="cond; uncond",
        shared=("img_shapes", "attention_kwargs"),
    ),
    Family(
        models=("CogView4Transformer2DModel",),
        x="hidden_states",
        top={
            "patch_embed.proj": "stem",
            "patch_embed.text_proj": "context",
            "proj_out": "head",
            "time_condition_embed.timestep_embedder.linear_*": "time",
            "time_condition_embed.condition_embedder.linear_*": "cond",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states",),
        cond=("original_size", "target_size", "crop_coords"),
        guidance="cond; uncond",
        shared=("image_rotary_emb", "attention_kwargs"),
    ),
)
