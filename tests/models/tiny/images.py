"""Tiny transformers over images whose text, if any, is attended to or concatenated as it is."""
# fmt: off

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from tests.models.tiny.case import Case, angles, case, noise, twice


def class_transformer() -> Case:
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=3,
                                  sample_size=8, patch_size=2, num_embeds_ada_norm=20, norm_num_groups=4)
    nn.init.normal_(model.proj_out_2.weight, std=0.1)
    given = {"hidden_states": noise(2, 4, 8, 8), "timestep": twice(7), "class_labels": torch.tensor([1, 2])}
    return case(model, given, x="hidden_states", t="timestep", label="class_labels")


def pixart(sizes: bool = True) -> Case:
    model = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8,
                                     num_layers=2, sample_size=8, patch_size=2, cross_attention_dim=24,
                                     caption_channels=32, use_additional_conditions=sizes)
    added = {"resolution": twice(64.0, 64), "aspect_ratio": torch.ones(2, 1)} if sizes else {"resolution": None, "aspect_ratio": None}
    given = {"hidden_states": noise(2, 4, 8, 8), "timestep": twice(7), "encoder_hidden_states": noise(2, 5, 32),
             "encoder_attention_mask": twice(1, 1, 1, 1, 0), "added_cond_kwargs": added}
    more = {"size": "added_cond_kwargs.resolution", "aspect": "added_cond_kwargs.aspect_ratio"} if sizes else {}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states", **more)


def pixart_sigma() -> Case:
    return pixart(sizes=False)


def sana(**options: Any) -> Case:
    model = SanaTransformer2DModel(**options, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
                                   num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8,
                                   cross_attention_dim=16, caption_channels=24, sample_size=8, patch_size=1)
    given = {"hidden_states": noise(2, 4, 8, 8), "timestep": twice(700), "encoder_hidden_states": noise(2, 6, 24),
             "encoder_attention_mask": twice(1, 1, 1, 1, 1, 0)}
    if options:
        given["guidance"] = twice(4.5)
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states",
                **dict.fromkeys(given.keys() & {"guidance"}, "guidance"))


def sana_guided() -> Case:
    return sana(guidance_embeds=True)


def hunyuandit() -> Case:
    model = HunyuanDiT2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8,
                              hidden_size=16, num_layers=4, cross_attention_dim=16, cross_attention_dim_t5=24,
                              pooled_projection_dim=16, text_len=5, text_len_t5=6, activation_fn="gelu-approximate")
    given = {"hidden_states": noise(2, 4, 8, 8), "timestep": twice(7.0), "encoder_hidden_states": noise(2, 5, 16),
             "text_embedding_mask": torch.ones(2, 5), "encoder_hidden_states_t5": noise(2, 6, 24),
             "text_embedding_mask_t5": torch.ones(2, 6), "image_meta_size": twice(64.0, 64, 64, 64, 0, 0),
             "style": twice(0), "image_rotary_emb": angles(16, 8)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states",
                other_text="encoder_hidden_states_t5", size="image_meta_size")


def lumina2() -> Case:
    model = Lumina2Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
                                      num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
                                      ffn_dim_multiplier=1, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=16)
    given = {"hidden_states": noise(2, 4, 8, 8), "timestep": twice(0.3), "encoder_hidden_states": noise(2, 6, 16),
             "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).bool()}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


def z_image() -> Case:
    model = ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2,
                                     n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
                                     axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    given = {"x": [noise(4, 1, 8, 8) for _ in range(2)], "t": twice(0.3), "cap_feats": [noise(6, 16) for _ in range(2)]}
    return case(model, given, x="x", t="t", text="cap_feats")


def krea2() -> Case:
    model = Krea2Transformer2DModel(in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                                    num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16,
                                    num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
                                    text_intermediate_size=24, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
                                    axes_dims_rope=(4, 6, 6))
    given = {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 6, 3, 16), "timestep": twice(0.7),
             "position_ids": torch.rand(22, 3)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


CASES = (class_transformer, pixart, pixart_sigma, sana, sana_guided, hunyuandit, lumina2, z_image, krea2)
