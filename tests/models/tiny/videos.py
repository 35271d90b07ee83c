"""Tiny networks over videos."""
# fmt: off

from __future__ import annotations

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
)
from torch import nn

from tests.models.tiny.case import Case, case, noise, twice


def wan() -> Case:
    model = WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
                                  out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    given = {"hidden_states": noise(2, 4, 3, 8, 8), "timestep": twice(700), "encoder_hidden_states": noise(2, 6, 16)}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states")


def cogvideox() -> Case:
    model = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                                        time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4,
                                        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
                                        use_rotary_positional_embeddings=True)
    given = {"hidden_states": noise(2, 3, 4, 4, 4), "timestep": twice(700), "encoder_hidden_states": noise(2, 6, 16),
             "image_rotary_emb": (torch.rand(12, 16), torch.rand(12, 16))}
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


def image_to_video() -> Case:
    model = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        num_attention_heads=(2, 4), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24)
    given = {"sample": noise(2, 2, 8, 8, 8), "timestep": torch.tensor(0.7), "encoder_hidden_states": noise(2, 1, 16),
             "added_time_ids": twice(6.0, 127, 0.02)}
    return case(model, given, x="sample", t="timestep", text="encoder_hidden_states", motion="added_time_ids")


def text_to_video() -> Case:
    model = UNet3DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=16)
    return case(without_zeros(model), {"sample": noise(2, 4, 2, 8, 8), "timestep": torch.tensor(7),
                                       "encoder_hidden_states": noise(2, 5, 16)},
                x="sample", t="timestep", text="encoder_hidden_states")


def without_zeros(model: nn.Module) -> nn.Module:
    """Layers that start at zero hide what they read from whoever looks at outputs."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


CASES = (wan, cogvideox, ltx, hunyuan_video, image_to_video, text_to_video)
