"""Which networks have names of their own in their repositories, and whether diffusers reads them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.loaders import single_file_model
from torch import Tensor

from stepquant.errors import ModelError
from stepquant.models.originals.renaming import Tensors
from stepquant.models.originals.transformers import flux, flux2, ltx, sd3, wan, z_image
from stepquant.models.originals.unets import latent_diffusion

WAYS: Mapping[str, Callable[[Tensors, Mapping[str, Any]], dict[str, Tensor]]] = {
    "Flux2Transformer2DModel": flux2,
    "FluxTransformer2DModel": flux,
    "LTXVideoTransformer3DModel": ltx,
    "SD3Transformer2DModel": sd3,
    "UNet2DConditionModel": latent_diffusion,
    "WanTransformer3DModel": wan,
    "ZImageTransformer2DModel": z_image,
    "QwenImageTransformer2DModel": lambda tensors, _: dict(tensors),  # whose repository has diffusers' names
}


ARCHITECTURES = {
    "Flux2Transformer2DModel": "flux",
    "FluxTransformer2DModel": "flux",
    "LTXVideoTransformer3DModel": "ltxv",
    "SD3Transformer2DModel": "sd3",
    "WanTransformer3DModel": "wan",
    "ZImageTransformer2DModel": "lumina2",
    "QwenImageTransformer2DModel": "qwen_image",
}


def architecture_of(kind: str, config: Mapping[str, Any]) -> str | None:
    """What files for ggml call a network, or None where they do not know it."""
    if kind == "UNet2DConditionModel":
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd1"
    return ARCHITECTURES.get(kind)


def in_original_names(kind: str, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What a network's tensors are in the original repository, or None where it is not known here."""
    if kind not in WAYS:
        return None
    made = WAYS[kind](tensors, config)
    known: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    convert = known[kind]["checkpoint_mapping_fn"]
    reasons = []
    for prefix in ("model.diffusion_model.", ""):  # which some converters look for, and few know nothing of
        try:
            back = convert(checkpoint={prefix + n: v for n, v in made.items()}, config=dict(config))
        except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
            reasons.append(f"{type(error).__name__} {str(error).splitlines()[0][:120]}")
            continue
        odd = sorted(
            name
            for name in {*tensors, *back}
            if name not in back or name not in tensors or not torch.equal(back[name], tensors[name])
        )
        if not odd:
            return made
        reasons.append(f"another '{odd[0]}' than it was given")
    raise ModelError(
        f"this {kind} has no original names that diffusers' own converter reads back",
        got="; ".join(reasons),
        expected="a network as its repository published it",
        fix="export it in the names of diffusers: --names diffusers",
    )
