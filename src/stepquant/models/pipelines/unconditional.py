"""Pipelines that are asked for nothing: their loop, for any scheduler of diffusers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stepquant.errors import ModelError
from stepquant.models.denoiser import Denoiser
from stepquant.models.pipelines.kind import Kind
from stepquant.models.sampling import Sampling, advance, generators, scheduler_of


def denoise(
    pipeline: Any, seeds: Sequence[int], sampling: Sampling, stop: int | None = None
) -> Iterator[Tensor]:
    """The states x of one batch of trajectories after each step; `stop` ends it early."""
    denoiser, scheduler = Denoiser.of(pipeline), scheduler_of(pipeline, sampling.sampler, sampling.steps)
    model: Any = denoiser.model
    if denoiser.family.guidance != "none":
        raise ModelError(
            f"{type(pipeline).__name__} does not fit its model",
            got=f"{type(model).__name__}, which must be asked for something",
            fix="save the model with the pipeline that it was trained for",
        )
    noise, shape = generators(seeds), (len(seeds), *denoiser.shape)
    x = randn_tensor(shape, generator=noise, device=model.device, dtype=model.dtype)
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            if stop is not None and index >= stop:
                return
            predicted = model(scheduler.scale_model_input(x, t), t, return_dict=False)[0]
            x = advance(scheduler, predicted, t, x, noise)
            yield x


def draw(
    pipeline: Any, seeds: Sequence[int], words: Sequence[str], sampling: Sampling, stop: int | None
) -> Tensor:
    if words:
        raise ModelError("this model takes no text", got="prompts", fix="leave --prompts out")
    x = last(denoise(pipeline, seeds, sampling, stop))
    return (decode(pipeline, x).float() / 2 + 0.5).clamp(0, 1)


def decode(pipeline: Any, x: Tensor) -> Tensor:
    """Latents to pixels where the pipeline works in a latent space."""
    autoencoder = pipeline.components.get("vqvae")
    if autoencoder is None:
        return x
    with torch.no_grad():
        pixels: Tensor = autoencoder.decode(
            x.to(autoencoder.dtype) / autoencoder.config.scaling_factor
        ).sample
    return pixels


def last(states: Iterator[Tensor]) -> Tensor:
    """The last state, without keeping the others."""
    return deque(states, maxlen=1).pop()


KIND = Kind(pipelines=("DDIMPipeline", "DDPMPipeline", "LDMPipeline"), draw=draw)
