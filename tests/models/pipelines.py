"""Tiny pipelines of several tasks around one text model: other parts are built here, its own are shared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from tests.models.tiny import conditional

TASKS: dict[str, Any] = {
    "image to image": StableDiffusionImg2ImgPipeline,
    "inpainting": StableDiffusionInpaintPipeline,
    "control": StableDiffusionControlNetPipeline,
    "few steps": LatentConsistencyModelPipeline,
}


def picture(shade: int = 90, size: int = 16, mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((size, size)).point(lambda x: (x + shade) % 256).convert(mode)


def made_for(task: str, text: StableDiffusionPipeline) -> Any:
    """The pipeline of a task, random and tiny."""
    torch.manual_seed(0)
    parts = dict(text.components)
    if task == "inpainting":
        parts["unet"] = conditional(sample_size=8, in_channels=9).eval()
    elif task == "control":
        parts["controlnet"] = ControlNetModel.from_unet(
            text.unet, conditioning_embedding_out_channels=(16, 16)
        ).eval()
        for layer in (*parts["controlnet"].controlnet_down_blocks, parts["controlnet"].controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.1)
    elif task == "few steps":
        parts["unet"] = conditional(sample_size=8, time_cond_proj_dim=32).eval()
        parts["scheduler"] = LCMScheduler(clip_sample=False)
    pipe = TASKS[task](**parts, requires_safety_checker=False)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config
    )  # it changes the settings that it is given
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALLS: dict[str, dict[str, Any]] = {
    "image to image": {"prompt": "a hat", "image": picture(), "strength": 0.5, "num_inference_steps": 8},
    "inpainting": {
        "prompt": "a hat",
        "image": picture(),
        "mask_image": picture(mode="L"),
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "strength": 1.0,
    },
    "control": {"prompt": "a hat", "image": picture(), "num_inference_steps": 4},
    "few steps": {"prompt": "a hat", "guidance_scale": 8.0, "num_inference_steps": 4},
}


class Filming(StableDiffusionPipeline):
    """A pipeline whose images are the frames of one video for each generator."""

    def __call__(  # type: ignore[override]
        self,
        prompt: Any,
        num_frames: int = 3,
        num_inference_steps: int = 2,
        generator: Any = None,
        output_type: str = "pt",
    ) -> Any:
        words = [prompt] if isinstance(prompt, str) else prompt
        seeds = [one.initial_seed() + frame for one in generator for frame in range(num_frames)]
        made = super().__call__(
            [word for word in words for _ in range(num_frames)],
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type=output_type,
        )
        return SimpleNamespace(frames=made.images.unflatten(0, (len(words), num_frames)))


class Sounding(StableDiffusionPipeline):
    """A pipeline whose images are heard: two channels of each, row after row."""

    def __call__(  # type: ignore[override]
        self, prompt: Any, num_inference_steps: int = 2, generator: Any = None, output_type: str = "pt"
    ) -> Any:
        made = super().__call__(
            prompt, num_inference_steps=num_inference_steps, generator=generator, output_type=output_type
        )
        return SimpleNamespace(audios=2 * made.images[:, :2].flatten(2) - 1)
