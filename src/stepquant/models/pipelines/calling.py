"""Calling a pipeline as its user would, with another scheduler for the time of the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepquant.models.sampling import Sampling, generators, scheduler_of


def images_of(pipeline: Any, seeds: Sequence[int], sampling: Sampling, **asked: Any) -> Tensor:
    """What the pipeline makes of what is asked, one generator an image."""
    own = pipeline.scheduler
    pipeline.scheduler = scheduler_of(pipeline, sampling.sampler, sampling.steps)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": sampling.steps, "generator": generators(seeds), "output_type": "pt"}
    try:
        out = pipeline(**asked, **options)
    finally:
        pipeline.scheduler = own
    return torch.as_tensor(out.images).float()
