"""Class-conditional transformers of diffusers (Peebles and Xie 2023, arXiv:2212.09748)."""

from __future__ import annotations

from stepquant.models.families.family import Family, children_of

FAMILIES = (
    Family(
        models=("DiTTransformer2DModel",),
        x="hidden_states",
        top={
            "pos_embed.proj": "stem",
            "proj_out_1": "modulate",
            "proj_out_2": "head",
            "**.norm1.emb.timestep_embedder.linear_1": "time",
            "**.norm1.emb.timestep_embedder.linear_2": "time",
        },
        blocks=children_of("transformer_blocks"),
        cond=("class_labels",),
        guidance="cond, uncond",
        shared=("cross_attention_kwargs",),
    ),
)
