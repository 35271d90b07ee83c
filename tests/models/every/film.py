"""Transformers of moving pictures with more than text beside them: sound, a camera, a first pass."""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.models.transformers import transformer_wan_animate_2
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.models.every.build import TEXT, Case, alive, masked_text, noise, text, times

PICTURE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 32,
    "rope_double_precision": False,
}


def ltx_2() -> Case:
    model = diffusers.LTX2VideoTransformer3DModel(**PICTURE)
    return model, {"hidden_states": noise(2, 32, 4), "timestep": times(), **text(32),
                   "audio_hidden_states": noise(2, 5, 8), "audio_encoder_hidden_states": noise(2, TEXT, 32),
                   "num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 5, "fps": 24.0}  # fmt: skip


def sana_world_refiner() -> Case:
    model = diffusers.SanaWMLTX2RefinerTransformer3DModel(**PICTURE)
    turns = model.build_rotary_emb_for_absolute_positions(2, [0, 1], 4, 4, torch.device("cpu"), fps=24.0)
    return model, {
        "hidden_states": noise(2, 32, 4),
        "timestep": times(),
        **text(32),
        "video_rotary_emb": turns,
    }


def sana_world() -> Case:
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, linear_head_dim=16, softmax_every_n=2,
        chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=2, caption_channels=32, mlp_ratio=2.0)  # fmt: skip
    # A camera is a pose of four by four, then the focal lengths and the center of its picture.
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4, 2, 2])]).repeat(2, 2, 1)
    first = masked_text(32)
    first["encoder_hidden_states"] = first["encoder_hidden_states"][:, None]
    return model, {"hidden_states": noise(2, 4, 2, 4, 4), "timestep": times()[:, None, None].repeat(1, 1, 2), **first,
                   "camera_conditions": camera, "chunk_plucker": noise(2, 6, 2, 4, 4)}  # fmt: skip


def mini_max_h3() -> Case:
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=64,
        in_channels=4, audio_in_channels=8, text_dim=32, freq_dim=32, time_embed_hidden_dim=32, time_embed_dim=32,
        rope_freq_dim=2)  # fmt: skip
    sound, pictures = 5, 8
    rows = torch.arange(TEXT + sound + pictures)
    words, sounds, patches = rows.split([TEXT, sound, pictures])
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2))
    positions = torch.cat([rows[: TEXT + sound, None].repeat(1, 3), grid + TEXT + sound])
    return model, {"hidden_states": noise(2, pictures, 16), "timestep": times(), **text(32),
                   "audio_hidden_states": noise(2, sound, 8), "timestep_indices": (rows // TEXT == 1).long(),
                   "token_tags": torch.tensor([1] * TEXT + [2] * sound + [0] * pictures), "position_ids": positions,
                   "text_indices": words, "audio_indices": sounds, "video_indices": patches}  # fmt: skip


KANDINSKY: dict[str, Any] = {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 32, "model_dim": 32, "ff_dim": 64,
                             "num_visual_blocks": 2, "axes_dims": (4, 6, 6)}  # fmt: skip


def kandinsky_5() -> Case:
    model = diffusers.Kandinsky5Transformer3DModel(
        **KANDINSKY, in_text_dim=32, in_text_dim2=16, num_text_blocks=1
    )
    places = tuple(torch.arange(count) for count in (2, 4, 4))
    return model, {"hidden_states": noise(2, 2, 8, 8, 4), "timestep": times(), **text(32),
                   "pooled_projections": noise(2, 16), "visual_rope_pos": places,
                   "text_rope_pos": torch.arange(TEXT)}  # fmt: skip


def kandinsky_6() -> Case:
    model = diffusers.Kandinsky6Transformer3DModel(
        **KANDINSKY, in_text_dim=32, in_text_dim2=16, num_text_blocks=1, in_audio_dim=8, out_audio_dim=8)  # fmt: skip
    return model, {"hidden_states": noise(2, 2, 8, 8, 9), "timestep": times(), **text(32),
                   "pooled_projections": noise(2, 16), "audio_hidden_states": noise(2, 5, 8)}  # fmt: skip


def kandinsky_6_upscaler() -> Case:
    model = diffusers.Kandinsky6SRTransformer3DModel(**KANDINSKY)
    return model, {"hidden_states": noise(2, 2, 8, 8, 9), "timestep": times()}


def cosmos_3() -> Case:
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=64, latent_channel=4, num_attention_heads=2,
        num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16, rope_axes_dim=(4, 2, 2), vocab_size=64,
        sound_gen=True, sound_dim=8)  # fmt: skip
    # One packed sequence without a batch: the words, two videos of one frame each, then a sound.
    words, patches, sounds = torch.arange(TEXT + 8 + 3).split([TEXT, 8, 3])
    return model, {"vision_tokens": [noise(1, 4, 1, 4, 4), noise(1, 4, 1, 4, 4)],
                   "vision_timesteps": times().float().repeat_interleave(4), "input_ids": torch.randint(64, (TEXT,)),
                   "text_indexes": words, "position_ids": torch.arange(TEXT + 8 + 3).repeat(3, 1), "und_len": TEXT,
                   "sequence_length": TEXT + 8 + 3, "vision_token_shapes": [(1, 2, 2)] * 2,
                   "vision_sequence_indexes": patches, "vision_mse_loss_indexes": patches,
                   "vision_noisy_frame_indexes": [torch.tensor([0])] * 2, "sound_tokens": [noise(8, 3)],
                   "sound_token_shapes": [(3, 1, 1)], "sound_sequence_indexes": sounds,
                   "sound_mse_loss_indexes": sounds, "sound_timesteps": torch.full((3,), 300.0),
                   "sound_noisy_frame_indexes": [torch.arange(3)]}  # fmt: skip


def uncompiled(*given: Any, _compile: bool, **named: Any) -> BlockMask:
    """The class compiles its mask, for longer than all else here takes."""
    return create_block_mask(*given, **named)


def wan_animate_2() -> Case:
    """A step of the generation, after the pass over the reference that fills the cache it reads."""
    model = diffusers.WanAnimate2Transformer3DModel(
        text_len=TEXT, in_dim=8, dim=32, ffn_dim=64, freq_dim=32, text_dim=32, out_dim=4, num_heads=2, num_layers=2,
        use_img_emb=False)  # fmt: skip
    with mock.patch.object(transformer_wan_animate_2, "create_block_mask", uncompiled):
        model.block_masks[2, 4] = model.create_mask(2, 4, torch.device("cpu"))
    cache = WanAnimate2KVCache(2)
    grid = torch.tensor([[2, 2, 2]] * 2)

    def given(frames: int) -> dict[str, Any]:
        return {"hidden_states": [noise(4, frames, 4, 4) for _ in range(2)], "timestep": times().float(),
                "encoder_hidden_states": [noise(TEXT, 32) for _ in range(2)],
                "condition_latents": [noise(4, frames, 4, 4) for _ in range(2)], "kv_cache": cache,
                "seq_len": frames * 4}  # fmt: skip

    with torch.no_grad():
        alive(model)(**given(2), kv_cache_mode="extract", offset_grid_sizes=grid)
    step = {"kv_cache_mode": "cached", "reference_grid_sizes": grid, "origin_len": 5, "origin_area": [32, 32]}
    return model, given(3) | step


FILM = {
    "LTX2VideoTransformer3DModel": ltx_2,
    "SanaWMLTX2RefinerTransformer3DModel": sana_world_refiner,
    "SanaWMTransformer3DModel": sana_world,
    "MiniMaxH3Transformer3DModel": mini_max_h3,
    "Kandinsky5Transformer3DModel": kandinsky_5,
    "Kandinsky6Transformer3DModel": kandinsky_6,
    "Kandinsky6SRTransformer3DModel": kandinsky_6_upscaler,
    "Cosmos3OmniTransformer": cosmos_3,
    "WanAnimate2Transformer3DModel": wan_animate_2,
}
