"""Tiny U-Nets over images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from tests.models.tiny.case import Case, noise


def unconditional(**options: Any) -> UNet2DModel:
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**settings | options)


def conditional(**options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**settings | options)


def inputs(channels: int, size: int = 16) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    first = {"sample": noise(2, channels, size, size), "timestep": torch.tensor(7)}
    return first, {"x": {"sample": noise(2, channels, size, size)}, "t": {"timestep": torch.tensor(9)}}


def text(case: Case, tokens: int = 7, width: int = 32) -> Case:
    model, given, changed = case
    given["encoder_hidden_states"] = noise(2, tokens, width)
    changed["text"] = {"encoder_hidden_states": noise(2, tokens, width)}
    return model, given, changed


def plain() -> Case:
    return unconditional(), *inputs(3)


def two_layers() -> Case:
    return unconditional(layers_per_block=2, block_out_channels=(16, 16, 32), attention_head_dim=None,
                         down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                         up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")), *inputs(3)  # fmt: skip


def class_scale_shift() -> Case:
    model = unconditional(
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=10,
        downsample_type="resnet",
        upsample_type="resnet",
    )
    given, changed = inputs(3)
    given["class_labels"] = torch.tensor([1, 2])
    return model, given, changed | {"class": {"class_labels": torch.tensor([3, 4])}}


def text_to_image() -> Case:
    return text((conditional(), *inputs(4)))


def linear_projection() -> Case:
    return text((conditional(attention_head_dim=(2, 4), use_linear_projection=True), *inputs(4)))


def class_conditional_latent() -> Case:
    model = conditional(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return text((model, *inputs(3, 8)), tokens=1)


def size_conditioned() -> Case:
    model = conditional(
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    model, given, changed = text((model, *inputs(4)), width=64)
    added = {"text_embeds": noise(2, 32), "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)}
    given["added_cond_kwargs"] = added
    changed["pooled"] = {"added_cond_kwargs": added | {"text_embeds": noise(2, 32)}}
    changed["size"] = {"added_cond_kwargs": added | {"time_ids": added["time_ids"] + 64}}
    return model, given, changed


def text_keys_beside_image_keys() -> Case:
    model = conditional(
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        act_fn="gelu",
        time_embedding_act_fn="gelu",
    )
    return text((model, *inputs(4)), width=24)


CASES = (
    plain,
    two_layers,
    class_scale_shift,
    text_to_image,
    linear_projection,
    class_conditional_latent,
    size_conditioned,
    text_keys_beside_image_keys,
)
