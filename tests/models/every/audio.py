"""Transformers that make sound: latents over time, or a spectrogram."""

from __future__ import annotations

import diffusers
import torch

from tests.models.every.build import TEXT, Case, masked_text, noise, text, times


def ace_step() -> Case:
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=4)  # fmt: skip
    return model, {"hidden_states": noise(2, 16, 8), "timestep": times(1), "timestep_r": times(1) / 2, **text(32),
                   "context_latents": noise(2, 16, 16)}  # fmt: skip


def long_cat_audio() -> Case:
    model = diffusers.LongCatAudioDiTTransformer(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=8,
                                                 ff_mult=2.0)  # fmt: skip
    return model, {"hidden_states": noise(2, 16, 8), "timestep": times(1), **masked_text(32),
                   "attention_mask": torch.ones(2, 16, dtype=torch.bool), "latent_cond": noise(2, 16, 8)}  # fmt: skip


def mini_max_music() -> Case:
    model = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=8, condition_dim=32, num_layers=2, num_attention_heads=2, attention_head_dim=16, ff_inner_dim=64,
        rotary_dim=8, fourier_embedding_dim=16)  # fmt: skip
    return model, {"hidden_states": noise(2, 8, 16), "timestep": times(1), **text(32, 16)}


def stable_audio_3() -> Case:
    model = diffusers.StableAudio3DiTModel(
        io_channels=8, embed_dim=32, depth=2, num_heads=2, cond_token_dim=32, global_cond_dim=16, local_add_cond_dim=9,
        timestep_features_dim=16, ff_mult=2.0, num_memory_tokens=4)  # fmt: skip
    return model, {"hidden_states": noise(2, 8, 16), "timestep": times(1), **text(32),
                   "global_hidden_states": noise(2, 16), "local_add_cond": noise(2, 9, 16)}  # fmt: skip


def film_decoder() -> Case:
    model = diffusers.T5FilmDecoder(input_dims=16, targets_length=16, d_model=32, num_layers=2, num_heads=2, d_kv=16,
                                    d_ff=64)  # fmt: skip
    notes = [(noise(2, TEXT, 32), torch.ones(2, TEXT)), (noise(2, 5, 32), torch.ones(2, 5))]
    return model, {"decoder_input_tokens": noise(2, 16, 16), "decoder_noise_time": times(1),
                   "encodings_and_masks": notes}  # fmt: skip


AUDIO = {
    "AceStepTransformer1DModel": ace_step,
    "LongCatAudioDiTTransformer": long_cat_audio,
    "MiniMaxMusic3Transformer1DModel": mini_max_music,
    "StableAudio3DiTModel": stable_audio_3,
    "T5FilmDecoder": film_decoder,
}
