"""Time to generate images, scheduler and all: the whole pipeline as its user calls it, in turns with the float model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stepquant.evaluate.speed.calls import (
    QUANTIZED,
    REFERENCE,
    Contender,
    fastest_type,
    in_layouts,
    row,
    threads,
    twin_of,
)
from stepquant.evaluate.speed.turns import interleave
from stepquant.evaluate.twins import Twins
from stepquant.models.call import Asked
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent


def generation(
    twins: Twins,
    sampling: Sampling,
    *,
    batches: Sequence[int] = (1, 8),
    seconds: float = 10.0,
    count: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Milliseconds for a batch of images, by the float model in its better layout and by the quantized pipeline.

    bf16 takes part where the processor multiplies it.
    """
    types = {REFERENCE: torch.float32}
    if fastest_type() == torch.bfloat16:
        types["bf16 eager"] = torch.bfloat16
    rows: list[dict[str, Any]] = []
    with threads(count) as used:
        for batch in (progress or Silent()).track(batches, "generating", len(batches)):
            pipelines = {
                name: in_better_layout(twins.float, dtype, batch, sampling.prompts)
                for name, dtype in types.items()
            } | {QUANTIZED: twins.quantized}
            calls = {
                name: lambda own=own, batch=batch: run(own, list(range(batch)), sampling)
                for name, own in pipelines.items()
            }
            for call in calls.values():
                call()
            rounds = interleave(calls, seconds, fewest=3, untimed=0)
            rows += [row(batch, Contender(name, call), rounds) for name, call in calls.items()]
    known = {"steps": sampling.steps, "sampler": sampling.sampler or type(twins.float.scheduler).__name__}
    return {"threads": used, **known, "reference": REFERENCE, "rows": rows}


def in_better_layout(pipeline: Any, dtype: torch.dtype, batch: int, prompts: Sequence[Asked]) -> Any:
    """The pipeline in `dtype`, its denoiser in the memory layout in which one call is faster."""
    denoiser = Denoiser.of(pipeline)
    ways = in_layouts(denoiser.model, first_arguments(pipeline, batch, prompts), dtype)
    calls = {way.name: way.call for way in ways if way.call is not None}
    rounds = interleave(calls, seconds=0.0, fewest=3)
    fastest = min(calls, key=lambda name: min(taken[name] for taken in rounds))
    layout = torch.channels_last if fastest == "channels-last" else torch.contiguous_format
    other = copy.copy(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            own = layout if name == denoiser.component else torch.contiguous_format
            setattr(other, name, twin_of(part, dtype, own))
    return other
