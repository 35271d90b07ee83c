"""What is known of the noise that a sampler adds."""

from __future__ import annotations

from typing import Any

import diffusers


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler adds noise of its own at every step, whose size can be changed.

    Others may have the same configuration: what they do not use stays in it.
    """
    sized = scheduler.config.get("variance_type") in ("fixed_small", "fixed_large")
    return sized and isinstance(scheduler, diffusers.DDPMScheduler)
