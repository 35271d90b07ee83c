"""Tiny U-Nets over videos."""
# fmt: off

from __future__ import annotations

import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel

from tests.models.tiny.case import Case, case, noise, twice, without_zeros


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


def animated() -> Case:
    model = UNetMotionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), layers_per_block=1,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), block_out_channels=(16, 32), norm_num_groups=8,
        cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8)
    given = {"sample": noise(2, 4, 2, 8, 8), "timestep": torch.tensor(7),
             "encoder_hidden_states": noise(2, 5, 16).repeat_interleave(2, 0)}  # once for each frame
    return case(without_zeros(model), given, x="sample", t="timestep", text="encoder_hidden_states")


def image_and_text_to_video() -> Case:
    model = I2VGenXLUNet(
        sample_size=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), layers_per_block=1,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), block_out_channels=(32, 64), norm_num_groups=16,
        cross_attention_dim=16, attention_head_dim=8)
    given = {"sample": noise(2, 4, 2, 8, 8), "timestep": torch.tensor(7), "fps": twice(16),
             "image_latents": noise(2, 4, 2, 8, 8), "image_embeddings": noise(2, 16), "encoder_hidden_states": noise(2, 5, 16)}
    return case(without_zeros(model), given, x="sample", t="timestep", text="encoder_hidden_states", fps="fps",
                latents="image_latents", image="image_embeddings")


CASES = (image_to_video, text_to_video, animated, image_and_text_to_video)
