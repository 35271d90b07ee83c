"""Transformers over images; text, if any, is attended to or stands in front of the image (Peebles and Xie 2023, arXiv:2212.09748)."""

from __future__ import annotations

from stepquant.models.families.family import Family, children_of, joined

FAMILIES = (
    Family(
        models=("DiTTransformer2DModel",),
        x="hidden_states",
        top={
            "pos_embed.proj": "stem",
            "proj_out_1": "modulate",
            "proj_out_2": "head",
            "**.norm1.emb.timestep_embedder.linear_*": "time",
        },
        blocks=children_of("transformer_blocks"),
        cond=("class_labels",),
        guidance="cond, uncond",
        shared=("cross_attention_kwargs",),
    ),
    Family(
        models=("PixArtTransformer2DModel",),
        x="hidden_states",
        top={
            "pos_embed.proj": "stem",
            "proj_out": "head",
            "adaln_single.emb.timestep_embedder.linear_*": "time",
            "adaln_single.emb.resolution_embedder.linear_*": "cond",
            "adaln_single.emb.aspect_ratio_embedder.linear_*": "cond",
            "caption_projection.linear_*": "context",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        cond=("added_cond_kwargs",),
        shared=("cross_attention_kwargs",),
    ),
    Family(
        models=("SanaTransformer2DModel",),
        x="hidden_states",
        top={
            "patch_embed.proj": "stem",
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
    Family(
        models=("HunyuanDiT2DModel",),
        x="hidden_states",
        top={
            "pos_embed.proj": "stem",
            "proj_out": "head",
            "time_extra_emb.timestep_embedder.linear_*": "time",
            "time_extra_emb.extra_embedder.linear_*": "cond",
            "text_embedder.linear_*": "context",
        },
        blocks=children_of("blocks"),
        text=(
            "encoder_hidden_states",
            "encoder_hidden_states_t5",
            "text_embedding_mask",
            "text_embedding_mask_t5",
        ),
        cond=("image_meta_size", "style"),
        shared=("image_rotary_emb",),
        concats=joined("blocks.*.skip_linear"),
        read=("time_extra_emb.pooler.*_proj",),
    ),
    Family(
        models=("Lumina2Transformer2DModel",),
        x="hidden_states",
        top={
            "x_embedder": "stem",
            "norm_out.linear_1": "modulate",
            "norm_out.linear_2": "head",
            "time_caption_embed.timestep_embedder.linear_*": "time",
            "time_caption_embed.caption_embedder.1": "context",
        },
        blocks=children_of("context_refiner", "noise_refiner", "layers"),
        prompt_blocks=("context_refiner",),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        guidance="cond; uncond",
        shared=("attention_kwargs",),
    ),
    Family(
        models=("ZImageTransformer2DModel",),
        x="x",
        t="t",
        top={
            "all_x_embedder.*": "stem",
            "all_final_layer.*.linear": "head",
            "all_final_layer.*.adaLN_modulation.1": "modulate",
            "t_embedder.mlp.*": "time",
            "cap_embedder.1": "context",
        },
        blocks=children_of("noise_refiner", "context_refiner", "layers"),
        prompt_blocks=("context_refiner",),
        text=("cap_feats",),
        guidance="cond, uncond",
        shared=("patch_size", "f_patch_size"),
    ),
    Family(
        models=("Krea2Transformer2DModel",),
        channels=-1,
        x="hidden_states",
        top={
            "img_in": "stem",
            "final_layer.linear": "head",
            "time_embed.linear_*": "time",
            "time_mod_proj": "modulate",
            "text_fusion.projector": "context",
            "txt_in.linear_*": "context",
        },
        blocks=children_of(
            "text_fusion.layerwise_blocks", "text_fusion.refiner_blocks", "transformer_blocks"
        ),
        prompt_blocks=("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        guidance="cond; uncond",
        shared=("position_ids", "attention_kwargs"),
    ),
)
