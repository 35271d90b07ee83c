"""Tiny pipelines that make videos and sounds, of random weights, as diffusers builds the large ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

WIDTH = 32
LETTERS = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -2.0),
    *((chr(97 + i), -3.0) for i in range(26)),
]
ENCODER: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 1,
    "num_heads": 4,
}
FILM = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
SOUND = {"audio_end_in_s": 2.0, "num_inference_steps": 3}


def tokenizer() -> Any:
    return transformers.T5Tokenizer(vocab=LETTERS, extra_ids=0, model_max_length=16)


def finished(pipeline: Any) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def film_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def film_pipeline(denoisers: int = 2) -> WanPipeline:
    """Text to video; of two denoisers the first serves t above 875, as in Wan 2.2."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return finished(
        WanPipeline(
            tokenizer(),
            transformers.UMT5EncoderModel(transformers.UMT5Config(**ENCODER)),
            vae,
            scheduler,
            film_transformer(),
            film_transformer() if denoisers == 2 else None,
            boundary_ratio=0.875 if denoisers == 2 else None,
        )
    )


def sound_pipeline() -> StableAudioPipeline:
    """Text to sound."""
    torch.manual_seed(0)
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=400,
    )
    network = StableAudioDiTModel(
        sample_size=400,
        in_channels=3,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    scheduler = EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    projection = StableAudioProjectionModel(
        text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
    )
    encoder = transformers.T5EncoderModel(transformers.T5Config(**ENCODER))
    return finished(StableAudioPipeline(vae, encoder, projection, tokenizer(), network, scheduler))
