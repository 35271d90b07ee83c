"""The networks of `benchmarks.architectures`: their configurations as published, transformers with fewer blocks.

Every block of a transformer costs the same, so that two to four of them have the ratios of all; images are 512 x 512 pixels,
the video 33 frames of 320 x 480, because attention over more would take most of a minute a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

Arguments = dict[str, Any]
Normal = Callable[..., Tensor]  # of sizes


@dataclass(frozen=True)
class Architecture:
    """How a network is made and called; `inputs` makes the arguments of a call from a batch size, a side and noise."""

    kind: str  # of diffusers
    config: dict[str, Any]
    size: int  # of the side of an image or of latents, where no other is asked for
    inputs: Callable[[int, int, Normal], Arguments]

    def make(self) -> Any:
        return getattr(diffusers, self.kind)(**self.config).eval().requires_grad_(False)

    def arguments(self, batch: int, size: int, seed: int = 0) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        return self.inputs(batch, size, lambda *sizes: torch.randn(*sizes, generator=generator))


def denoiser(channels: int, text: tuple[int, int] | None = None) -> Callable[[int, int, Normal], Arguments]:
    """The call of a U-Net; `text` is how many tokens of what width it reads."""

    def inputs(batch: int, size: int, normal: Normal) -> Arguments:
        given = {"sample": normal(batch, channels, size, size), "timestep": torch.tensor(501)}
        return given if text is None else given | {"encoder_hidden_states": normal(batch, *text)}

    return inputs


def dit(batch: int, size: int, normal: Normal) -> Arguments:
    return {
        "hidden_states": normal(batch, 4, size, size),
        "timestep": torch.full((batch,), 501),
        "class_labels": torch.arange(batch),
    }


def first(batch: int, tokens: int, used: int) -> Tensor:
    """The mask of a prompt that leaves the tokens after the first ones empty."""
    return (torch.arange(tokens) < used).float().expand(batch, -1)


def pixart(batch: int, size: int, normal: Normal) -> Arguments:
    return {
        "hidden_states": normal(batch, 4, size, size),
        "timestep": torch.full((batch,), 501),
        "encoder_hidden_states": normal(batch, 300, 4096),
        "encoder_attention_mask": first(batch, 300, 40),
    }


def sd3(batch: int, size: int, normal: Normal) -> Arguments:
    return {
        "hidden_states": normal(batch, 16, size, size),
        "timestep": torch.full((batch,), 501.0),
        "encoder_hidden_states": normal(batch, 333, 4096),
        "pooled_projections": normal(batch, 2048),
    }


def flux(batch: int, size: int, normal: Normal) -> Arguments:
    rows, columns = torch.meshgrid(torch.arange(size // 2), torch.arange(size // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    return {
        "hidden_states": normal(batch, len(places), 64),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "encoder_hidden_states": normal(batch, 512, 4096),
        "pooled_projections": normal(batch, 768),
        "img_ids": places.float(),
        "txt_ids": torch.zeros(512, 3),
    }


def z_image(batch: int, size: int, normal: Normal) -> Arguments:
    return {
        "x": [normal(16, 1, size, size) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [normal(96, 2560) for _ in range(batch)],
    }


def flux2(batch: int, size: int, normal: Normal) -> Arguments:
    rows = size // 2
    places = torch.cartesian_prod(
        torch.zeros(1), torch.arange(1.0 * rows), torch.arange(1.0 * rows), torch.zeros(1)
    )
    words = torch.cartesian_prod(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.arange(512.0))
    return {
        "hidden_states": normal(batch, rows * rows, 128),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": normal(batch, 512, 7680),
        "img_ids": places,
        "txt_ids": words,
    }


def lumina2(batch: int, size: int, normal: Normal) -> Arguments:
    return {
        "hidden_states": normal(batch, 16, size, size),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": normal(batch, 256, 2304),
        "encoder_attention_mask": first(batch, 256, 40).bool(),
    }


def hunyuan_video(batch: int, size: int, normal: Normal) -> Arguments:
    return {
        "hidden_states": normal(batch, 16, 9, size, size * 3 // 2),
        "timestep": torch.full((batch,), 501.0),
        "encoder_hidden_states": normal(batch, 256, 4096),
        "encoder_attention_mask": first(batch, 256, 40),
        "pooled_projections": normal(batch, 768),
        "guidance": torch.full((batch,), 6000.0),
    }


def ltx(batch: int, size: int, normal: Normal) -> Arguments:
    frames, rows, columns = 9, size // 2, size * 3 // 4
    return {
        "hidden_states": normal(batch, frames * rows * columns, 128),
        "timestep": torch.full((batch,), 501.0),
        "encoder_hidden_states": normal(batch, 128, 4096),
        "encoder_attention_mask": first(batch, 128, 40),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


def wan(batch: int, size: int, normal: Normal) -> Arguments:
    return {
        "hidden_states": normal(batch, 16, 9, size, size * 3 // 2),
        "timestep": torch.full((batch,), 501),
        "encoder_hidden_states": normal(batch, 512, 4096),
    }


def decoder(batch: int, size: int, normal: Normal) -> Arguments:
    return {"sample": normal(batch, 4, size, size)}


ARCHITECTURES = {
    # runwayml/stable-diffusion-v1-5, vae
    "vae": Architecture(
        "AutoencoderKL",
        {
            "sample_size": 512,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        },
        64,
        decoder,
    ),
    # google/ddpm-cifar10-32
    "ddpm": Architecture(
        "UNet2DModel",
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
        32,
        denoiser(3),
    ),
    # Stable Diffusion 1.5's block structure at a quarter of its width
    "latent": Architecture(
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "block_out_channels": (80, 160, 320, 320),
            "layers_per_block": 2,
            "attention_head_dim": 2,  # heads, by its old name: each 40 wide at the top, as in the original
            "cross_attention_dim": 192,
            "norm_num_groups": 16,
        },
        64,
        denoiser(4, (77, 192)),
    ),
    "dit-xl": Architecture("DiTTransformer2DModel", {"out_channels": 8, "num_layers": 4}, 32, dit),
    "pixart-sigma": Architecture(
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "use_additional_conditions": False, "num_layers": 3},
        64,
        pixart,
    ),
    "sd3.5-medium": Architecture(
        "SD3Transformer2DModel",
        {
            "num_layers": 3,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0, 1),  # 13 of 24
        },
        64,
        sd3,
    ),
    "flux": Architecture(
        "FluxTransformer2DModel",
        {"guidance_embeds": True, "num_layers": 1, "num_single_layers": 2},
        64,
        flux,
    ),
    "z-image": Architecture(
        "ZImageTransformer2DModel",
        {"n_layers": 2, "n_refiner_layers": 1},
        64,
        z_image,
    ),
    # black-forest-labs/FLUX.2-klein-4B
    "flux2-klein": Architecture(
        "Flux2Transformer2DModel",
        {
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
            "num_layers": 1,
            "num_single_layers": 3,
        },
        64,
        flux2,
    ),
    # Alpha-VLLM/Lumina-Image-2.0
    "lumina2": Architecture(
        "Lumina2Transformer2DModel",
        {"cap_feat_dim": 2304, "num_layers": 3, "num_refiner_layers": 1},
        64,
        lumina2,
    ),
    "hunyuan-video": Architecture(
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1},
        20,
        hunyuan_video,
    ),
    "ltx": Architecture("LTXVideoTransformer3DModel", {"num_layers": 4}, 20, ltx),
    "wan-1.3b": Architecture(
        "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 2}, 32, wan
    ),
}
