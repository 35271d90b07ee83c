"""Transformers that make one image: its latents come as a picture or as tokens of a picture."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
)

from tests.models.every.build import TEXT, Case, masked_text, noise, places, text, times


def aura_flow() -> Case:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64)  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": times(1), **text(32)}


def cog_view_3() -> Case:
    model = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, text_embed_dim=32,
        time_embed_dim=32, condition_dim=16, pos_embed_max_size=8, sample_size=8)  # fmt: skip
    size, corner = torch.tensor([[64.0, 64]] * 2), torch.zeros(2, 2)
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": times(), **text(32),
                   "original_size": size, "target_size": size, "crop_coords": corner}  # fmt: skip


def glm_image() -> Case:
    model = diffusers.GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, text_embed_dim=32,
        time_embed_dim=32, condition_dim=16, prior_vq_quantizer_codebook_size=64)  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": times(), **text(32),
                   "prior_token_id": torch.randint(64, (2, 16)), "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
                   "target_size": torch.tensor([[64.0, 64]] * 2), "crop_coords": torch.zeros(2, 2)}  # fmt: skip


def ernie_image() -> Case:
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=16, out_channels=16,
        text_in_dim=32, rope_axes_dim=(8, 4, 4))  # fmt: skip
    return model, {"hidden_states": noise(2, 16, 4, 4), "timestep": times(1),
                   "text_bth": noise(2, TEXT, 32), "text_lens": torch.tensor([TEXT, TEXT - 2])}  # fmt: skip


def hi_dream() -> Case:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[32, 16], text_emb_dim=32, num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(8, 4, 4), max_resolution=(8, 8), llama_layers=[0, 1], force_inference_output=True)  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 8, 8), "timesteps": times(), "pooled_embeds": noise(2, 32),
                   "encoder_hidden_states_t5": noise(2, TEXT, 32),
                   "encoder_hidden_states_llama3": noise(2, 2, TEXT, 16)}  # fmt: skip


def hunyuan_image() -> Case:
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32, rope_axes_dim=(8, 8))  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 4, 4), "timestep": times().float(), **masked_text(32)}


def joy_image() -> Case:
    model = diffusers.JoyImageEditTransformer3DModel(hidden_size=32, num_attention_heads=2, text_dim=32, num_layers=2,
                                                     rope_dim_list=[4, 6, 6])  # fmt: skip
    return model, {"hidden_states": noise(2, 16, 1, 4, 4), "timestep": times(), **text(32)}


def joy_image_plus() -> Case:
    model = diffusers.JoyImageEditPlusTransformer3DModel(hidden_size=32, num_attention_heads=2, text_dim=32,
                                                         num_layers=2, rope_dim_list=[4, 6, 6])  # fmt: skip
    shapes = [[(1, 2, 2), (1, 2, 2)]] * 2
    return model, {
        "hidden_states": noise(2, 8, 16, 1, 2, 2),
        "timestep": times(),
        **text(32),
        "shape_list": shapes,
    }


def lumina_next() -> Case:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        learn_sigma=False, cross_attention_dim=32)  # fmt: skip
    torch.nn.init.normal_(model.pad_token)  # left as it lay in memory
    turns = torch.polar(torch.ones(4, 4, 8), noise(4, 4, 8))
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": times(1), **text(32),
                   "encoder_mask": torch.ones(2, TEXT), "image_rotary_emb": turns, "cross_attention_kwargs": {}}  # fmt: skip


def nucleus() -> Case:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4), num_experts=4, moe_intermediate_dim=32,
        capacity_factors=2.0)  # fmt: skip
    for name, experts in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(
                experts, std=0.1
            )  # left as they lay in memory: a checkpoint always fills them
    mask = torch.ones(2, TEXT, dtype=torch.long)
    return model, {"hidden_states": noise(2, 16, 16), "timestep": times(1), **text(32),
                   "encoder_hidden_states_mask": mask, "img_shapes": [(1, 4, 4)] * 2}  # fmt: skip


def omni_gen() -> Case:
    model = diffusers.OmniGenTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64, num_layers=2, pad_token_id=0,
        vocab_size=100, time_step_dim=16, pos_embed_max_size=8,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8})  # fmt: skip
    tokens = TEXT + 1 + 16
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": times(1), "input_ids": torch.randint(100, (2, TEXT)),
                   "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(2, tokens, tokens),
                   "position_ids": torch.arange(tokens).repeat(2, 1)}  # fmt: skip


def prx() -> Case:
    model = diffusers.PRXTransformer2DModel(in_channels=4, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2,
                                            depth=2, axes_dim=[8, 8])  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": times(1), **text(32)}


def krea_2() -> Case:
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=32, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4))  # fmt: skip
    mask = masked_text(1)["encoder_attention_mask"]
    return model, {"hidden_states": noise(2, 16, 16), "timestep": times(1), "encoder_attention_mask": mask,
                   "encoder_hidden_states": noise(2, TEXT, 2, 32),
                   "position_ids": torch.cat([torch.zeros(TEXT, 3), places(4, 4)])}  # fmt: skip


def ideogram_4() -> Case:
    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=64, adaln_dim=16,
        llm_features_dim=32, rope_theta=10000, mrope_section=(4, 2, 2))  # fmt: skip
    tokens = TEXT + 16
    indicator = torch.tensor([[LLM_TOKEN_INDICATOR] * TEXT + [OUTPUT_IMAGE_INDICATOR] * 16] * 2)
    words = torch.arange(float(TEXT))[:, None].repeat(1, 3)
    positions = torch.cat([words, places(4, 4) + IMAGE_POSITION_OFFSET]).long().repeat(2, 1, 1)
    return model, {"hidden_states": noise(2, tokens, 16), "timestep": times(1), **text(32, tokens),
                   "position_ids": positions, "segment_ids": torch.ones(2, tokens, dtype=torch.long),
                   "indicator": indicator}  # fmt: skip


def qwen_image_21() -> Case:
    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
        axes_dims_rope=(4, 6, 6))  # fmt: skip
    # The image is expected after the text, a slot of the encoder for each four of its tokens.
    slots = torch.tensor([[False] * TEXT + [True] * 4] * 2)
    return model, {"hidden_states": noise(2, 16, 16), "timestep": times(1), **text(32),
                   "img_shapes": [[(1, 4, 4)]] * 2, "img_mask": slots}  # fmt: skip


IMAGE = {
    "AuraFlowTransformer2DModel": aura_flow,
    "CogView3PlusTransformer2DModel": cog_view_3,
    "GlmImageTransformer2DModel": glm_image,
    "ErnieImageTransformer2DModel": ernie_image,
    "HiDreamImageTransformer2DModel": hi_dream,
    "HunyuanImageTransformer2DModel": hunyuan_image,
    "JoyImageEditTransformer3DModel": joy_image,
    "JoyImageEditPlusTransformer3DModel": joy_image_plus,
    "LuminaNextDiT2DModel": lumina_next,
    "NucleusMoEImageTransformer2DModel": nucleus,
    "OmniGenTransformer2DModel": omni_gen,
    "PRXTransformer2DModel": prx,
    "Krea2Transformer2DModel": krea_2,
    "Ideogram4Transformer2DModel": ideogram_4,
    "QwenImage21Transformer2DModel": qwen_image_21,
}
