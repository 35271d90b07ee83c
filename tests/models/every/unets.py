"""UNets: of images, of videos, and of the tokens of an image."""

from __future__ import annotations

import diffusers
import torch

from tests.models.every.build import TEXT, Case, noise, text, times


def dream_lite_unet() -> Case:
    model = diffusers.DreamLiteUNetModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=16, ff_mult=2,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"))  # fmt: skip
    return model, {"sample": noise(2, 4, 8, 8), "timestep": times(), **text(32)}


def image_to_video() -> Case:
    """What the class calls the width of a head is the number of heads."""
    model = diffusers.I2VGenXLUNet(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))  # fmt: skip
    return model, {"sample": noise(2, 4, 2, 8, 8), "timestep": times(), **text(32), "fps": torch.tensor([16, 24]),
                   "image_latents": noise(2, 4, 2, 8, 8), "image_embeddings": noise(2, 32)}  # fmt: skip


def kandinsky_3() -> Case:
    model = diffusers.Kandinsky3UNet(
        time_embedding_dim=32, groups=8, attention_head_dim=16, layers_per_block=2, block_out_channels=(32, 32),
        cross_attention_dim=32, encoder_hid_dim=32)  # fmt: skip
    mask = torch.ones(2, TEXT)
    return model, {
        "sample": noise(2, 4, 8, 8),
        "timestep": times(),
        **text(32),
        "encoder_attention_mask": mask,
    }


def motion() -> Case:
    model = diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"))  # fmt: skip
    # The text is repeated for every frame.
    prompts = text(32)["encoder_hidden_states"].repeat_interleave(2, dim=0)
    return model, {"sample": noise(2, 4, 2, 8, 8), "timestep": times(), "encoder_hidden_states": prompts}


def cascade() -> Case:
    kinds = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    model = diffusers.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=32, conditioning_dim=32, block_out_channels=(32, 32),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        block_types_per_layer=(kinds, kinds), clip_text_in_channels=32, clip_text_pooled_in_channels=32,
        clip_image_in_channels=16, clip_seq=2, switch_level=(False,))  # fmt: skip
    return model, {"sample": noise(2, 4, 8, 8), "timestep_ratio": times(1), "clip_text_pooled": noise(2, 1, 32),
                   "clip_text": noise(2, TEXT, 32), "clip_img": noise(2, 1, 16)}  # fmt: skip


def controlled() -> Case:
    model = diffusers.UNetControlNetXSModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=32, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ctrl_block_out_channels=(16, 16), ctrl_num_attention_heads=1, ctrl_max_norm_num_groups=8,
        ctrl_conditioning_embedding_out_channels=(16, 16))  # fmt: skip
    return model, {"sample": noise(2, 4, 8, 8), "timestep": times(), **text(32),
                   "controlnet_cond": noise(2, 3, 16, 16)}  # fmt: skip


UNETS = {
    "DreamLiteUNetModel": dream_lite_unet,
    "I2VGenXLUNet": image_to_video,
    "Kandinsky3UNet": kandinsky_3,
    "UNetMotionModel": motion,
    "StableCascadeUNet": cascade,
    "UNetControlNetXSModel": controlled,
}
