"""Tiny modular pipelines, of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux3AutoBlocks,
    Flux3Transformer2DModel,
    ModularPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.models.media import finished

VOCABULARY = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3, "b": 4, "b</w>": 5}


def tokenizer() -> Any:
    return transformers.CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=16)


def encoder(kind: Any) -> Any:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def ordinary() -> StableDiffusionXLPipeline:
    """What a modular pipeline can be made of, too: its parts are the same."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    encoders = encoder(transformers.CLIPTextModel), encoder(transformers.CLIPTextModelWithProjection)
    scheduler = EulerDiscreteScheduler()
    return finished(StableDiffusionXLPipeline(vae, *encoders, tokenizer(), tokenizer(), unet, scheduler))  # type: ignore[no-any-return]


def save_modular(folder: Path) -> Path:
    """A folder that has an index of modular pipelines and no other."""
    ordinary().save_pretrained(folder / "ordinary")
    pipeline = ModularPipeline.from_pretrained(str(folder / "ordinary"))
    pipeline.load_components(
        [name for name in pipeline.component_names if (folder / "ordinary" / name).is_dir()]
    )
    pipeline.save_pretrained(str(folder / "modular"), overwrite_modular_index=True)
    return folder / "modular"


def flow() -> tuple[Any, dict[str, Any]]:
    """A FLUX.3 without its text encoder, and a call that brings what that would have made of two prompts."""
    torch.manual_seed(0)
    blocks = Flux3AutoBlocks()
    for name in ("prompt_upsampler", "text_encoder"):
        blocks.sub_blocks.pop(name)
    transformer = Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = blocks.init_pipeline()
    pipeline.update_components(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler()
    )
    prompts = {name: torch.randn(1, 6, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return pipeline, {**prompts, "height": 32, "width": 32}
