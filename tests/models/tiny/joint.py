"""Tiny transformers in which a stream of text runs beside the image."""
# fmt: off

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanImageTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)

from tests.models.tiny.case import Case, case, noise, twice


def sd3(**options: Any) -> Case:
    model = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
                                  attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
                                  caption_projection_dim=16, pooled_projection_dim=64, pos_embed_max_size=16, **options)
    given = {"hidden_states": noise(2, 4, 8, 8), "timestep": twice(700.0), "encoder_hidden_states": noise(2, 6, 32),
             "pooled_projections": noise(2, 64)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states", pooled="pooled_projections")


def sd3_dual() -> Case:
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1))


def flux() -> Case:
    model = FluxTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
                                   num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
                                   guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    given = {"hidden_states": noise(2, 16, 4), "timestep": twice(0.7), "encoder_hidden_states": noise(2, 6, 32),
             "pooled_projections": noise(2, 32), "guidance": twice(3.5), "img_ids": torch.rand(16, 3), "txt_ids": torch.zeros(6, 3)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states",
                pooled="pooled_projections", guidance="guidance")


def flux2() -> Case:
    model = Flux2Transformer2DModel(in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
                                    num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=256,
                                    axes_dims_rope=(4, 4, 4, 4))
    given = {"hidden_states": noise(2, 16, 4), "timestep": twice(0.7), "encoder_hidden_states": noise(2, 6, 32),
             "guidance": twice(3.5), "img_ids": torch.rand(16, 4), "txt_ids": torch.zeros(6, 4)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states", guidance="guidance")


def qwen_image() -> Case:
    model = QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                                        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(8, 4, 4))
    given = {"hidden_states": noise(2, 16, 16), "timestep": twice(0.7), "encoder_hidden_states": noise(2, 6, 32),
             "encoder_hidden_states_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]), "img_shapes": [[(1, 4, 4)]] * 2}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


def cogview4() -> Case:
    model = CogView4Transformer2DModel(patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                                       num_attention_heads=2, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
                                       pos_embed_max_size=16, sample_size=8, rope_axes_dim=(4, 4))
    given = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 6, 16), "timestep": twice(7.0),
             "original_size": twice(64.0, 64), "target_size": twice(64.0, 64), "crop_coords": twice(0.0, 0)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states",
                size="original_size", target="target_size", crop="crop_coords")


def cogview3() -> Case:
    model = CogView3PlusTransformer2DModel(patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
                                           num_attention_heads=2, out_channels=4, text_embed_dim=16, time_embed_dim=8,
                                           condition_dim=4, pos_embed_max_size=16, sample_size=8)
    given = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 6, 16), "timestep": twice(7),
             "original_size": twice(64.0, 64), "target_size": twice(64.0, 64), "crop_coords": twice(0.0, 0)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states",
                size="original_size", target="target_size", crop="crop_coords")


def auraflow() -> Case:
    model = AuraFlowTransformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
                                       attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
                                       caption_projection_dim=16, out_channels=4, pos_embed_max_size=64)
    given = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 6, 32), "timestep": twice(0.7)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


def with_places(**given: Any) -> dict[str, Any]:
    return {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 6, 32), "img_ids": torch.rand(16, 3),
            "txt_ids": torch.zeros(6, 3), **given}


def chroma() -> Case:
    model = ChromaTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
                                     num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
                                     approximator_num_channels=64, approximator_hidden_dim=16, approximator_layers=1)
    return case(model, with_places(timestep=twice(0.7)), x="hidden_states", t="timestep", text="encoder_hidden_states")


def bria() -> Case:
    model = BriaTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
                                   num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=[4, 6, 6])
    return case(model, with_places(timestep=twice(700.0)), x="hidden_states", t="timestep", text="encoder_hidden_states")


def hunyuan_image() -> Case:
    model = HunyuanImageTransformer2DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
                                           num_layers=1, num_single_layers=2, num_refiner_layers=1, patch_size=(1, 1),
                                           guidance_embeds=True, text_embed_dim=16, text_embed_2_dim=12, rope_axes_dim=(8, 8))
    given = {"hidden_states": noise(2, 4, 4, 4), "timestep": twice(700.0), "encoder_hidden_states": noise(2, 6, 16),
             "encoder_attention_mask": torch.ones(2, 6), "encoder_hidden_states_2": noise(2, 5, 12),
             "encoder_attention_mask_2": torch.ones(2, 5), "guidance": twice(3500.0)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states",
                glyphs="encoder_hidden_states_2", guidance="guidance")


CASES = (sd3, sd3_dual, flux, flux2, qwen_image, cogview4, cogview3, auraflow, chroma, bria, hunyuan_image)
