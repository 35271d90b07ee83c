"""Tiny networks over sounds and other sequences."""
# fmt: off

from __future__ import annotations

import torch
from diffusers import AudioLDM2UNet2DConditionModel, StableAudioDiTModel, UNet1DModel

from tests.models.tiny.case import Case, case, noise, twice


def two_texts() -> Case:
    model = AudioLDM2UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=((None, 16, 32), (None, 16, 32)),
        transformer_layers_per_block=1)
    given = {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": noise(2, 5, 16),
             "encoder_hidden_states_1": noise(2, 6, 32), "encoder_attention_mask_1": torch.ones(2, 6)}
    return case(model, given, x="sample", t="timestep", text="encoder_hidden_states", other_text="encoder_hidden_states_1")


def stable_audio() -> Case:
    model = StableAudioDiTModel(sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
                                num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
                                global_states_input_dim=16, cross_attention_input_dim=16)
    given = {"hidden_states": noise(2, 4, 16), "timestep": twice(0.7), "encoder_hidden_states": noise(2, 6, 16),
             "global_hidden_states": noise(2, 1, 16), "rotary_embedding": (torch.rand(17, 4), torch.rand(17, 4))}
    return case(model, given, x="hidden_states", t="timestep", text="encoder_hidden_states", seconds="global_hidden_states")


def waveform() -> Case:
    model = UNet1DModel(sample_size=64, in_channels=2, out_channels=2, extra_in_channels=16,
                        block_out_channels=(32, 32, 64), time_embedding_dim=16)
    return case(model, {"sample": noise(2, 2, 64), "timestep": twice(0.7)}, x="sample", t="timestep")


def plan_of_actions() -> Case:
    model = UNet1DModel(sample_size=16, in_channels=6, out_channels=6, layers_per_block=1, block_out_channels=(16, 32),
                        down_block_types=("DownResnetBlock1D",) * 2, up_block_types=("UpResnetBlock1D",),
                        mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock",
                        time_embedding_type="positional", use_timestep_embedding=True, act_fn="mish",
                        flip_sin_to_cos=False, freq_shift=1, norm_num_groups=8, downsample_each_block=False)
    return case(model, {"sample": noise(2, 6, 16), "timestep": twice(7)}, x="sample", t="timestep")


CASES = (two_texts, stable_audio, waveform, plan_of_actions)
