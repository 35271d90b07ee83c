"""Sampling with diffusers' own schedulers: seeds in, images out, one seed per trajectory."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stepquant.errors import ModelError, UnknownNameError
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Progress, Silent

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def scheduler_of(pipeline: Any, sampler: str | None, steps: int | None = None) -> Any:
    """A fresh scheduler of that name with the noise schedule of the pipeline's own, ready for so many steps.

    None keeps the pipeline's class. A quantized model may carry a change of the sampler's noise, which is made here.
    """
    if sampler is None:
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    elif sampler in SAMPLERS:
        kind, options = SAMPLERS[sampler]
        scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **options)
    else:
        raise UnknownNameError("sampler", sampler, SAMPLERS)
    if steps is not None:
        most = scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise ModelError(
                "no such number of sampling steps",
                got=steps,
                expected=f"1 to {most}",
                fix="give another --steps",
            )
        scheduler.set_timesteps(steps)
    tables = getattr(Denoiser.of(pipeline).model, "steps", None)
    return scheduler if tables is None else tables.carry(scheduler)


def advance(
    scheduler: Any, predicted: Tensor, t: Tensor, x: Tensor, noise: list[torch.Generator] | None = None
) -> Tensor:
    """The state after a step; each row draws from its own generator where the sampler adds noise."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": noise} if takes else {}
    out: Tensor = scheduler.step(predicted, t, x, return_dict=False, **extra)[0]
    return out


def generators(seeds: Sequence[int], device: Any = "cpu") -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


def denoise(
    pipeline: Any, seeds: Sequence[int], steps: int, sampler: str | None = None, stop: int | None = None
) -> Iterator[Tensor]:
    """The states x of one batch of trajectories after each step of an unconditional pipeline.

    The loop is that of diffusers' unconditional pipelines, for any of its schedulers; `stop` ends it early.
    """
    denoiser, scheduler = Denoiser.of(pipeline), scheduler_of(pipeline, sampler, steps)
    model: Any = denoiser.model
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


def is_unconditional(pipeline: Any) -> bool:
    return Denoiser.of(pipeline).family.guidance == "none"


def run(
    pipeline: Any,
    seeds: Sequence[int],
    steps: int,
    sampler: str | None = None,
    prompts: Sequence[str] | None = None,
    stop: int | None = None,
) -> Tensor:
    """Images (n, 3, h, w) in [0, 1] of one batch of seeds."""
    if is_unconditional(pipeline):
        if prompts:
            raise ModelError("this model takes no text", got="prompts", fix="leave --prompts out")
        x = last(denoise(pipeline, seeds, steps, sampler, stop))
        return (decode(pipeline, x).float() / 2 + 0.5).clamp(0, 1)
    return run_prompts(pipeline, seeds, steps, sampler, prompts)


def decode(pipeline: Any, x: Tensor) -> Tensor:
    """Latents to pixels where the pipeline works in a latent space."""
    autoencoder = getattr(pipeline, "vqvae", None)
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


def prompts_of(seeds: Sequence[int], prompts: Sequence[str]) -> list[str]:
    """The prompt of every seed."""
    return [prompts[int(seed) % len(prompts)] for seed in seeds]


def run_prompts(
    pipeline: Any, seeds: Sequence[int], steps: int, sampler: str | None, prompts: Sequence[str] | None
) -> Tensor:
    if not prompts:
        raise ModelError(
            "this pipeline needs prompts",
            got="none",
            fix="give a file with one prompt per line: --prompts FILE",
        )
    own = pipeline.scheduler
    pipeline.scheduler = scheduler_of(pipeline, sampler, steps)
    pipeline.set_progress_bar_config(disable=True)
    chosen = prompts_of(seeds, prompts)
    try:
        out = pipeline(chosen, num_inference_steps=steps, generator=generators(seeds), output_type="pt")
    finally:
        pipeline.scheduler = own
    return torch.as_tensor(out.images).float()


def sample(
    pipeline: Any,
    seeds: Sequence[int],
    *,
    steps: int = 50,
    sampler: str | None = None,
    batch: int = 32,
    prompts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Images of all seeds in batches; a seed gives the same image in any batch up to float rounding."""
    starts = range(0, len(seeds), batch)
    for start in (progress or Silent()).track(starts, "generating", len(starts)):
        yield run(pipeline, seeds[start : start + batch], steps, sampler, prompts)
