"""Transformers over sounds."""

from __future__ import annotations

from stepquant.models.families.family import Family, children_of

FAMILIES = (
    Family(
        models=("StableAudioDiTModel",),
        x="hidden_states",
        top={
            "preprocess_conv": "stem",
            "proj_in": "stem",
            "proj_out": "head",
            "postprocess_conv": "head",
            "timestep_proj.*": "time",
            "global_proj.*": "cond",
            "cross_attention_proj.*": "context",
        },
        blocks=children_of("transformer_blocks"),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        cond=("global_hidden_states",),
        shared=("rotary_embedding",),
    ),
)
