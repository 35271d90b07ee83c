"""What is known of the noise that a sampler adds."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from torch import Tensor


def adds_noise(scheduler: Any, eta: float = 0.0) -> bool:
    """Whether a scheduler adds noise of its own at every step, whose size can be changed; DDIM where `eta` asks for it.

    Others may have the same configuration: what they do not use stays in it.
    """
    if takes_eta(scheduler):
        return (eta or eta_of(scheduler)) > 0
    sized = scheduler.config.get("variance_type") in ("fixed_small", "fixed_large")
    return sized and isinstance(scheduler, diffusers.DDPMScheduler)


def takes_eta(scheduler: Any) -> bool:
    return isinstance(scheduler, diffusers.DDIMScheduler)


def eta_of(scheduler: Any) -> float:
    """The share of noise that a scheduler adds where its caller asks for none."""
    return float(getattr(scheduler, "eta", 0.0))


def with_eta(scheduler: Any, eta: float) -> Any:
    """`scheduler`, in place, adding that share of DDPM's noise where its caller asks for none."""
    own, given = scheduler.step, eta

    @functools.wraps(own)
    def step(*args: Any, eta: float = 0.0, **kwargs: Any) -> Any:
        return own(*args, eta=eta or given, **kwargs)

    scheduler.eta, scheduler.step = given, step
    return scheduler


def answer_of_clean(scheduler: Any, kept: Tensor) -> Tensor:
    """How the predicted clean state answers to the prediction, where `kept` of the variance is left."""
    return {
        "epsilon": -((1 - kept) / kept).sqrt(),
        "v_prediction": -(1 - kept).sqrt(),
        "sample": torch.ones_like(kept),
    }[scheduler.config.prediction_type]


def left_of_noise(scheduler: Any, t: Any, eta: float, error: Tensor) -> Tensor:
    """What DDIM's noise is multiplied with, so that with an `error` of that variance in the prediction the state has the
    variance that it has without: s'^2 = s^2 - (d mean / d prediction)^2 error (Eq. 12 and 16 of arXiv:2010.02502)."""
    before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    kept = scheduler.alphas_cumprod[t]
    kept_before = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    own = eta**2 * scheduler._get_variance(t, before)
    clean = answer_of_clean(scheduler, kept)
    noise = -(kept / (1 - kept)).sqrt() * clean
    rate = kept_before.sqrt() * clean + (1 - kept_before - own).clamp(min=0).sqrt() * noise
    return (1 - rate**2 * error.to(kept.device) / own.clamp(min=1e-20)).clamp(min=0).sqrt()
