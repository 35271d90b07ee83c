"""What a benchmark measures beside single calls: whole generations, first images, and where a call spends its time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepquant.evaluate.speed.breakdown import breakdown
from stepquant.evaluate.speed.calls import calling, threads
from stepquant.evaluate.speed.generation import generation
from stepquant.evaluate.twins import Twins
from stepquant.job.fresh_process import first_images
from stepquant.job.pipelines import load, prompts_of, sampling_of
from stepquant.job.results import artifact_config, load_twin
from stepquant.models.call import Asked, steps_of
from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import first_arguments
from stepquant.progress import Progress


def benchmark_generation(
    folder: Path,
    against: str | None = None,
    *,
    batches: Sequence[int] = (1, 8),
    steps: int = 10,
    seconds: float = 10.0,
    count: int | None = None,
    prompts: Sequence[Asked] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Whole generations in turns, then every variant in a process of its own for its first images and its memory.

    By the pipeline's own sampler; in that and the steps of an artifact that knows those alone.
    """
    quantized = load(folder)
    config = artifact_config(quantized, folder)
    source = load_twin(quantized, against)
    asked = tuple(prompts) or prompts_of(config)
    known = config.steps is not None or steps_of(asked, None) is not None
    sampling = sampling_of(quantized, None if known else steps, prompts=asked)
    found = generation(
        Twins(source, quantized),
        sampling,
        batches=batches,
        seconds=seconds,
        count=count,
        progress=progress,
    )
    model = against or str(config.recipe["model"])
    variants = {
        "fp32 eager": (model, "fp32"),
        "bf16 eager": (model, "bf16"),
        "stepquant": (str(folder), "as it is"),
    }
    processes = [
        row
        for batch in batches
        for row in first_images(
            variants, batch, sampling.steps, count or torch.get_num_threads(), sampling.prompts
        )
    ]
    return found | {"processes": processes}


def profile_call(
    model: str | Path, batch: int, count: int | None = None, prompts: Sequence[Asked] = ()
) -> dict[str, Any]:
    """One call of a denoiser, operation by operation."""
    pipeline = load(model)
    call = calling(Denoiser.of(pipeline).model, first_arguments(pipeline, batch, prompts))
    with threads(count) as used:
        return {"threads": used, "batch": batch} | breakdown(call)
