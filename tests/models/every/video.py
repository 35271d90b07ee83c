"""Transformers that make a video from text."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.models.every.build import TEXT, Case, masked_text, noise, text, times

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN: dict[str, Any] = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64,
                       "num_layers": 2}  # fmt: skip


def given(channels: int = 4, width: int = 32) -> dict[str, Any]:
    return {"hidden_states": noise(2, channels, 2, 8, 8), "timestep": times(), **text(width)}


def allegro() -> Case:
    model = diffusers.AllegroTransformer3DModel(
        **HEADS, num_layers=2, cross_attention_dim=32, sample_height=8, sample_width=8, sample_frames=2,
        caption_channels=32)  # fmt: skip
    return model, given()


def any_flow() -> Case:
    model = diffusers.AnyFlowTransformer3DModel(**WAN, rope_max_seq_len=32)
    start, stop = times()[:, None].repeat(1, 2).float(), times()[:, None].repeat(1, 2) / 2
    return model, {"hidden_states": noise(2, 2, 4, 8, 8), "timestep": start, "r_timestep": stop, **text(32)}


def any_flow_far() -> Case:
    model = diffusers.AnyFlowFARTransformer3DModel(**WAN, rope_max_seq_len=32)
    start, stop = times()[:, None].repeat(1, 2).float(), times()[:, None].repeat(1, 2) / 2
    return model, {"hidden_states": noise(2, 2, 4, 8, 8), "timestep": start, "r_timestep": stop, **text(32),
                   "chunk_partition": [1, 1]}  # fmt: skip


def chrono_edit() -> Case:
    return diffusers.ChronoEditTransformer3DModel(**WAN, rope_max_seq_len=32), given()


def consis_id() -> Case:
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=32,
        text_embed_dim=32, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=5, max_text_seq_length=TEXT, is_train_face=True, cross_attn_interval=1,
        cross_attn_dim_head=16, cross_attn_num_heads=2, LFE_id_dim=16, LFE_vit_dim=16, LFE_depth=5, LFE_dim_head=16,
        LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=4, LFE_output_dim=32, LFE_ff_mult=1,
        LFE_num_scale=5)  # fmt: skip
    return model, {"hidden_states": noise(2, 2, 4, 8, 8), "timestep": times(), **text(32), "id_cond": noise(2, 16),
                   "id_vit_hidden": [noise(2, 3, 16) for _ in range(5)]}  # fmt: skip


def cosmos() -> Case:
    model = diffusers.CosmosTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=16,
        max_size=(4, 8, 8), concat_padding_mask=False)  # fmt: skip
    return model, given() | {
        "fps": 24
    }  # a mask of the padding is resized by torchvision, which is not at hand


def easy_animate() -> Case:
    model = diffusers.EasyAnimateTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, patch_size=2, mmdit_layers=1, num_layers=2, sample_height=8,
        sample_width=8, text_embed_dim=32, time_embed_dim=32)  # fmt: skip
    return model, given()


def helios() -> Case:
    model = diffusers.HeliosTransformer3DModel(**WAN, rope_dim=(4, 6, 6))
    frames = {"short": 1, "mid": 2, "long": 4}
    seen = {"latents_history_" + name: noise(2, 4, count, 8, 8) for name, count in frames.items()}
    starts = {"long": 0, "mid": 4, "short": 6}
    order = {f"indices_latents_history_{name}": torch.arange(first, first + frames[name]).repeat(2, 1)
             for name, first in starts.items()}  # fmt: skip
    return model, given() | seen | order | {"indices_hidden_states": torch.arange(7, 9).repeat(2, 1)}


def hunyuan_video_15() -> Case:
    """The one large model, of 4.4 million parameters: its second text always passes 2048 channels."""
    model = diffusers.HunyuanVideo15Transformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32,
        text_embed_2_dim=16, image_embed_dim=16, rope_axes_dim=(4, 4, 8), target_size=16, task_type="t2v")  # fmt: skip
    second = {key + "_2": value for key, value in masked_text(16, 5).items()}
    return model, {"hidden_states": noise(2, 4, 2, 4, 4), "timestep": times().float(), **masked_text(32), **second,
                   "image_embeds": noise(2, 3, 16)}  # fmt: skip


def framepack() -> Case:
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0,
        text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(4, 4, 8), has_image_proj=True, image_proj_dim=16,
        has_clean_x_embedder=True)  # fmt: skip
    past = {"latents_clean": noise(2, 4, 1, 4, 4), "indices_latents_clean": torch.arange(4, 5),
            "latents_history_2x": noise(2, 4, 2, 4, 4), "indices_latents_history_2x": torch.arange(2, 4),
            "latents_history_4x": noise(2, 4, 4, 4, 4), "indices_latents_history_4x": torch.arange(4)}  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 2, 4, 4), "timestep": times(), **masked_text(32), **past,
                   "pooled_projections": noise(2, 32), "image_embeds": noise(2, 3, 16), "guidance": times(),
                   "indices_latents": torch.arange(5, 7)}  # fmt: skip


def latte() -> Case:
    model = diffusers.LatteTransformer3DModel(
        **HEADS, sample_size=8, num_layers=1, patch_size=2, caption_channels=32, in_channels=4, out_channels=8,
        cross_attention_dim=32, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2)  # fmt: skip
    return model, given()


def mochi() -> Case:
    model = diffusers.MochiTransformer3DModel(
        **HEADS, num_layers=2, pooled_projection_dim=32, in_channels=4, text_embed_dim=32, time_embed_dim=32,
        max_sequence_length=TEXT)  # fmt: skip
    return model, given() | masked_text(32)


def motif_video() -> Case:
    model = diffusers.MotifVideoTransformer3DModel(
        **HEADS, in_channels=9, out_channels=4, num_layers=1, num_single_layers=1, num_decoder_layers=1, mlp_ratio=2.0,
        text_embed_dim=32, rope_axes_dim=(4, 4, 8), enable_text_cross_attention_dual=True)  # fmt: skip
    return model, given(9) | masked_text(32)


def sana_video() -> Case:
    model = diffusers.SanaVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=32, mlp_ratio=2.0, sample_size=8, rope_max_seq_len=32)  # fmt: skip
    return model, given()


def sky_reels() -> Case:
    return diffusers.SkyReelsV2Transformer3DModel(**WAN, rope_max_seq_len=32), given()


def wan_vace() -> Case:
    model = diffusers.WanVACETransformer3DModel(
        **WAN, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=8
    )
    return model, given() | {"control_hidden_states": noise(2, 8, 2, 8, 8)}


def wan_animate() -> Case:
    model = diffusers.WanAnimateTransformer3DModel(
        **(WAN | {"in_channels": 12}), latent_channels=4, image_dim=16, rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=16,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=32, face_encoder_num_heads=2,
        inject_face_latents_blocks=2)  # fmt: skip
    # A face every frame, a latent every fourth and one more that the reference image takes.
    return model, {"hidden_states": noise(2, 12, 3, 8, 8), "timestep": times(), **text(32),
                   "encoder_hidden_states_image": noise(2, 5, 16), "pose_hidden_states": noise(2, 4, 2, 8, 8),
                   "face_pixel_values": noise(2, 3, 5, 16, 16)}  # fmt: skip


VIDEO = {
    "AllegroTransformer3DModel": allegro,
    "AnyFlowTransformer3DModel": any_flow,
    "AnyFlowFARTransformer3DModel": any_flow_far,
    "ChronoEditTransformer3DModel": chrono_edit,
    "ConsisIDTransformer3DModel": consis_id,
    "CosmosTransformer3DModel": cosmos,
    "EasyAnimateTransformer3DModel": easy_animate,
    "HeliosTransformer3DModel": helios,
    "HunyuanVideo15Transformer3DModel": hunyuan_video_15,
    "HunyuanVideoFramepackTransformer3DModel": framepack,
    "LatteTransformer3DModel": latte,
    "MochiTransformer3DModel": mochi,
    "MotifVideoTransformer3DModel": motif_video,
    "SanaVideoTransformer3DModel": sana_video,
    "SkyReelsV2Transformer3DModel": sky_reels,
    "WanVACETransformer3DModel": wan_vace,
    "WanAnimateTransformer3DModel": wan_animate,
}
