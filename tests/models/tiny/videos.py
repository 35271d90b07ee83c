"""Tiny transformers over videos."""
# fmt: off

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from tests.models.tiny.case import Case, angles, case, noise, twice, without_zeros


def wan() -> Case:
    return case(WanTransformer3DModel(**WAN), with_text(), x="hidden_states", t="timestep", text="encoder_hidden_states")


WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
       "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32}


def with_text(tokens: int = 6, **given: Any) -> dict[str, Any]:
    return {"hidden_states": noise(2, 4, 2, 8, 8), "timestep": twice(700),
            "encoder_hidden_states": noise(2, tokens, 16), **given}


def wan_from_image() -> Case:
    model = WanTransformer3DModel(**WAN, image_dim=8, added_kv_proj_dim=24)
    given = with_text(512, encoder_hidden_states_image=noise(2, 3, 8))  # its processor counts on 512 tokens
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states", image="encoder_hidden_states_image")


def wan_controlled() -> Case:
    model = WanVACETransformer3DModel(**WAN | {"num_layers": 3}, vace_layers=[0, 2], vace_in_channels=6)
    given = with_text(control_hidden_states=noise(2, 6, 2, 8, 8))
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states", control="control_hidden_states")


def skyreels() -> Case:
    return case(SkyReelsV2Transformer3DModel(**WAN), with_text(), x="hidden_states", t="timestep", text="encoder_hidden_states")


def cosmos() -> Case:
    # A mask of the padding is resized by torchvision, which is not at hand.
    model = CosmosTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
                                     mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=16, max_size=(4, 8, 8),
                                     concat_padding_mask=False, use_crossattn_projection=True, crossattn_proj_in_channels=16,
                                     encoder_hidden_states_channels=16)
    given = {"hidden_states": noise(2, 4, 2, 8, 8), "timestep": twice(700), "encoder_hidden_states": noise(2, 6, 16), "fps": 24}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


def cogvideox() -> Case:
    model = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                                        time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4,
                                        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
                                        use_rotary_positional_embeddings=True)
    given = {"hidden_states": noise(2, 3, 4, 4, 4), "timestep": twice(700), "encoder_hidden_states": noise(2, 6, 16),
             "image_rotary_emb": angles(12, 16)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


def ltx() -> Case:
    model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
                                       cross_attention_dim=16, num_layers=2, caption_channels=24)
    given = {"hidden_states": noise(2, 18, 4), "timestep": twice(700.0), "encoder_hidden_states": noise(2, 6, 24),
             "encoder_attention_mask": torch.ones(2, 6), "num_frames": 2, "height": 3, "width": 3}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


def hunyuan_video() -> Case:
    model = HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
                                           num_layers=1, num_single_layers=2, num_refiner_layers=1, patch_size=2,
                                           patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
                                           pooled_projection_dim=8, rope_axes_dim=(2, 4, 4))
    given = {"hidden_states": noise(2, 4, 3, 8, 8), "timestep": twice(700), "encoder_hidden_states": noise(2, 6, 16),
             "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]), "pooled_projections": noise(2, 8),
             "guidance": twice(6000.0)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states",
                pooled="pooled_projections", guidance="guidance")


def hunyuan_video15() -> Case:
    model = HunyuanVideo15Transformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
                                             num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16,
                                             text_embed_2_dim=12, image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=16)
    given = {"hidden_states": noise(2, 4, 1, 4, 4), "timestep": twice(700.0), "encoder_hidden_states": noise(2, 6, 16),
             "encoder_attention_mask": torch.ones(2, 6), "encoder_hidden_states_2": noise(2, 5, 12),
             "encoder_attention_mask_2": torch.ones(2, 5), "image_embeds": noise(2, 3, 8)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states",
                glyphs="encoder_hidden_states_2", image="image_embeds")


def mochi() -> Case:
    model = MochiTransformer3DModel(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
                                    pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=16,
                                    max_sequence_length=6)
    given = with_text(encoder_attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).bool())
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


def allegro() -> Case:
    model = AllegroTransformer3DModel(patch_size=2, num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
                                      num_layers=2, cross_attention_dim=48, sample_height=8, sample_width=8,
                                      sample_frames=2, caption_channels=16)
    return case(model, with_text(), x="hidden_states", t="timestep", text="encoder_hidden_states")


def latte() -> Case:
    model = LatteTransformer3DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
                                    cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2,
                                    activation_fn="gelu-approximate", norm_type="ada_norm_single", caption_channels=16,
                                    norm_elementwise_affine=False, norm_eps=1e-6, video_length=2)
    return case(model, with_text(), x="hidden_states", t="timestep", text="encoder_hidden_states")


def sana_video() -> Case:
    model = SanaVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
                                        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12,
                                        cross_attention_dim=24, caption_channels=16, sample_size=8, patch_size=(1, 2, 2))
    given = with_text(encoder_attention_mask=twice(1, 1, 1, 1, 1, 0))
    return case(without_zeros(model), given, x="hidden_states", t="timestep", text="encoder_hidden_states")


CASES = (
    wan, wan_from_image, wan_controlled, skyreels, cosmos, cogvideox, ltx, hunyuan_video, hunyuan_video15, mochi, allegro, latte,
    sana_video,
)
