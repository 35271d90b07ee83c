"""Sampling: how trajectories are asked for, and diffusers' own schedulers that make their steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from stepquant.errors import ModelError, UnknownNameError
from stepquant.models.call import Asked
from stepquant.models.denoiser import denoisers
from stepquant.models.noise import eta_of, with_eta
from stepquant.models.tables import tables_of

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim-eta1": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


ETA = {"ddim-eta1": 1.0}  # the share of DDPM's noise that is added at every step


class Enough(Exception):  # noqa: N818 - it ends a sampling loop early, it is no error
    """All wanted steps of the running batch have been seen."""


@dataclass(frozen=True)
class Sampling:
    """How trajectories are asked for; a seed makes one of them."""

    steps: int
    sampler: str | None = None  # None: the pipeline's own
    # Texts, or calls that are written out, in turn, by seed; none: what the pipeline knows by itself.
    prompts: tuple[Asked, ...] = ()


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
        check_steps(scheduler, steps)
        scheduler.set_timesteps(steps)
    eta = eta_of(pipeline.scheduler) if sampler is None else ETA.get(sampler, 0.0)
    scheduler = with_eta(scheduler, eta) if eta else scheduler
    for model in denoisers(pipeline).values():
        tables = tables_of(model)
        scheduler = scheduler if tables is None else tables.carry(scheduler)
    return scheduler


def check_steps(scheduler: Any, steps: int) -> None:
    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ModelError(
            "no such number of sampling steps",
            got=steps,
            expected=f"1 to {most}",
            fix="give another --steps",
        )


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
