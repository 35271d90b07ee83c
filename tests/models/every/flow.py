"""Transformers with two streams, then one: text and image tokens, each placed by its own ids."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.models.every.build import TEXT, Case, masked_text, noise, places, text, times

SIZES: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def given(most: int = 1) -> dict[str, Any]:
    return {"hidden_states": noise(2, 16, 16), "timestep": times(most).float(), **text(32),
            "img_ids": places(4, 4), "txt_ids": torch.zeros(TEXT, 3)}  # fmt: skip


def bria() -> Case:
    return diffusers.BriaTransformer2DModel(**SIZES), given(1000)


def bria_fibo() -> Case:
    layers = [noise(2, TEXT, 16), noise(2, TEXT, 16)]
    model = diffusers.BriaFiboTransformer2DModel(**SIZES, text_encoder_dim=16)
    return model, given(1000) | {"text_encoder_layers": layers}


def bria_fibo_2() -> Case:
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=32, injection_layer_ids=(1,),
        perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=1, gist_min_text_len=2,
        gist_max_text_len=8, axes_dims=(8, 4, 4), axes_lens=(32, 8, 8))  # fmt: skip
    mask = masked_text(1)["encoder_attention_mask"]
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": times(1),
                   "encoder_hidden_states": noise(2, 2, TEXT, 32), "encoder_attention_mask": mask}  # fmt: skip


def chroma() -> Case:
    model = diffusers.ChromaTransformer2DModel(
        **SIZES, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1
    )
    return model, given()


def flux_3() -> Case:
    model = diffusers.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4))  # fmt: skip
    first = given()
    ids = {name: torch.nn.functional.pad(first[name], (0, 1)) for name in ("img_ids", "txt_ids")}
    later = torch.tensor([10.0, 0, 0, 0])
    return model, first | ids | {
        "image_cond_hidden_states": noise(2, 16, 16),
        "image_cond_ids": ids["img_ids"] + later,
    }


def long_cat_image() -> Case:
    return diffusers.LongCatImageTransformer2DModel(**SIZES, pooled_projection_dim=32), given()


def ovis_image() -> Case:
    return diffusers.OvisImageTransformer2DModel(**SIZES, out_channels=16), given()


FLOW = {
    "BriaTransformer2DModel": bria,
    "BriaFiboTransformer2DModel": bria_fibo,
    "BriaFibo2Transformer2DModel": bria_fibo_2,
    "ChromaTransformer2DModel": chroma,
    "Flux3Transformer2DModel": flux_3,
    "LongCatImageTransformer2DModel": long_cat_image,
    "OvisImageTransformer2DModel": ovis_image,
}
