"""Pipelines around denoisers of their published depth and width, with random weights.

Texts come to them as embeddings of the usual number of tokens, so that text encoders stay away; autoencoders are tiny.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderKLWan, DDIMScheduler, DiffusionPipeline

from stepquant.job.tensors import OF_TEXTS, Writer

Arguments = dict[str, Any]
T5_XXL: Arguments = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
NARROW: Arguments = {"d_model": 8, "d_ff": 8, "num_heads": 1, "num_layers": 1, "vocab_size": 32}
DOWN = 8  # pixels by latents of a side, in autoencoders of videos


def text_encoder(width: int) -> tuple[Any, Any]:
    """A tokenizer of one letter, and an encoder with a single narrow layer between embeddings of that width."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
    config = transformers.CLIPTextConfig(vocab_size=4, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1)  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    return tokenizer, transformers.CLIPTextModel(config).eval()


def unet(width: float, latents: int) -> Any:
    """The U-Net of Stable Diffusion 1.5 with its channels times `width`."""
    return network(
        "UNet2DConditionModel",
        torch.float32,
        sample_size=latents,
        block_out_channels=tuple(round(channels * width) for channels in (320, 640, 1280, 1280)),
        attention_head_dim=8,
        cross_attention_dim=768,
        norm_num_groups=math.gcd(32, round(320 * width)),
    )


def network(kind: str, dtype: torch.dtype, **config: Any) -> Any:
    """A network of diffusers with random weights."""
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, kind)(**config)
    return drawn(model.to(dtype))


def drawn(model: Any) -> Any:
    """A model whose parameters have no storage, with random weights that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(0)
    for name, former in list(model.named_parameters()):
        value = torch.empty(former.shape, dtype=former.dtype)
        if value.ndim > 1:
            value.normal_(std=math.sqrt(1 / value[0].numel()), generator=generator)
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value))
    return model.eval()


def letters() -> Any:
    """T5's tokenizer, which knows letters alone."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    known = [*marks, *((chr(ord("a") + place), -3.0) for place in range(26))]
    return transformers.T5Tokenizer(vocab=known, extra_ids=0, model_max_length=300)


def coder(channels: int, **config: Any) -> Any:
    """A tiny autoencoder of pictures, of two pixels by latent."""
    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=channels, **config,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip


def coder_of_videos() -> Any:
    return AutoencoderKLWan(base_dim=3, dim_mult=[1] * 4, num_res_blocks=1)


def around(kind: str, **parts: Any) -> Any:
    """A pipeline of these parts, and of no others."""
    made: Any = getattr(diffusers, kind)
    expected, _ = made._get_signature_keys(made)
    pipe: DiffusionPipeline = made(**dict.fromkeys(expected) | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embedded(tokens: int, width: int, dtype: torch.dtype, pooled: int = 0) -> Arguments:
    """A text and the empty one, as a text encoder gives them."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"prompt_embeds": (1, tokens, width)} | ({"pooled_prompt_embeds": (1, pooled)} if pooled else {})
    return {
        f"{sign}{name}": torch.randn(size, generator=generator).to(dtype)
        for sign in ("", "negative_")
        for name, size in sizes.items()
    }


def picture(latents: int, times: int = 2) -> Arguments:
    return {"height": times * latents, "width": times * latents}


def sd15(latents: int, dtype: torch.dtype, width: float = 1) -> tuple[Any, Arguments]:
    made = around(
        "StableDiffusionPipeline",
        vae=coder(4).eval().to(dtype),
        unet=unet(width, latents).to(dtype),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    return made, embedded(77, 768, dtype) | picture(latents)


def sdxl(latents: int, dtype: torch.dtype) -> tuple[Any, Arguments]:
    """stabilityai/stable-diffusion-xl-base-1.0."""
    model = network(
        "UNet2DConditionModel",
        dtype,
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    made = around("StableDiffusionXLPipeline", vae=coder(4).eval().to(dtype), unet=model, scheduler=scheduler)
    return made, embedded(77, 2048, dtype, pooled=1280) | picture(latents)


def sd35_medium(latents: int, dtype: torch.dtype) -> tuple[Any, Arguments]:
    """stabilityai/stable-diffusion-3.5-medium."""
    model = network(
        "SD3Transformer2DModel",
        dtype,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = around(
        "StableDiffusion3Pipeline",
        vae=coder(16, shift_factor=0.0).eval().to(dtype),
        transformer=model,
        scheduler=scheduler,
    )
    return made, embedded(333, 4096, dtype, pooled=2048) | picture(latents)


def wan(latents: int, dtype: torch.dtype) -> tuple[Any, Arguments]:
    """Wan-AI/Wan2.1-T2V-1.3B-Diffusers, three frames of latents half as wide again as they are high."""
    model = network("WanTransformer3DModel", dtype, num_attention_heads=12, ffn_dim=8960, num_layers=30)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    made = around(
        "WanPipeline",
        tokenizer=letters(),
        text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(**T5_XXL | NARROW)),
        vae=coder_of_videos().eval().to(dtype),
        transformer=model,
        scheduler=scheduler,
    )
    frames = {"height": DOWN * latents, "width": DOWN * latents * 3 // 2, "num_frames": 9}
    return made, embedded(512, 4096, dtype) | frames


def t5_xxl(latents: int, dtype: torch.dtype) -> tuple[Any, Arguments]:
    """What makes pictures of the text of google/t5-v1_1-xxl, whose encoder is there without its layers."""
    model = diffusers.PixArtTransformer2DModel(
        sample_size=latents,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=T5_XXL["d_model"],
        norm_type="ada_norm_single",
    )
    made = around(
        "PixArtSigmaPipeline",
        tokenizer=letters(),
        text_encoder=transformers.T5EncoderModel(
            transformers.T5Config(**T5_XXL | NARROW | {"d_model": T5_XXL["d_model"]})
        ),
        vae=coder(4).eval().to(dtype),
        transformer=model.eval().to(dtype),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    return made, {"prompt": "a", "use_resolution_binning": False, "clean_caption": False} | picture(latents)


def save_text_encoder(folder: Path, dtype: torch.dtype) -> None:
    """The encoder of google/t5-v1_1-xxl, one tensor after the other: a million random numbers over and over."""
    config = transformers.T5Config(**T5_XXL)
    with torch.device("meta"):
        like = transformers.T5EncoderModel(config).to(dtype).state_dict()
    like.pop("encoder.embed_tokens.weight")  # the same as `shared`
    config.architectures, config.dtype = ["T5EncoderModel"], dtype
    config.save_pretrained(folder)
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with Writer(folder / OF_TEXTS, like) as file:
        for name, value in like.items():
            times = -(-value.numel() // len(numbers))
            std = math.sqrt(1 / value.shape[-1]) if value.ndim > 1 else 1.0
            file.put(name, (std * numbers).to(dtype).repeat(times)[: value.numel()].reshape(value.shape))


PIPELINES: dict[str, Callable[..., tuple[Any, Arguments]]] = {
    "sd1.5": sd15,
    "sdxl": sdxl,
    "sd3.5-medium": sd35_medium,
    "wan-1.3b": wan,
    "t5-xxl": t5_xxl,
}
TEXTS = ("t5-xxl",)  # of which the text encoder is what is measured
