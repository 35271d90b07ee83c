"""Results of any pipeline, images, videos or sounds: seeds in, tensors out, one seed per trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import ModelError
from stepquant.models.call import Asked, Call
from stepquant.models.pipelines.calling import result_of_call
from stepquant.models.pipelines.registry import kind_of
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent


def words_of(pipeline: Any, sampling: Sampling) -> tuple[Asked, ...]:
    """All that the results of a pipeline are to show, in turn; nothing where it cannot be asked."""
    return sampling.prompts or kind_of(pipeline).words(pipeline)


def asked_of(pipeline: Any, seeds: Sequence[int], sampling: Sampling) -> list[Asked]:
    """What the result of every seed is to show."""
    words = words_of(pipeline, sampling)
    return [words[int(seed) % len(words)] for seed in seeds] if words else []


def together(seeds: Sequence[int], sampling: Sampling) -> list[Sequence[int]]:
    """The seeds that the denoiser meets in one batch: a call that is written out stands alone."""
    written = any(isinstance(one, Call) for one in sampling.prompts)
    return [[seed] for seed in seeds] if written else [seeds]


def run(pipeline: Any, seeds: Sequence[int], sampling: Sampling, stop: int | None = None) -> Tensor:
    """Images (n, 3, h, w) in [0, 1] of one batch of seeds; videos and sounds have a dimension more or less."""
    made = [run_together(pipeline, some, sampling, stop) for some in together(seeds, sampling)]
    for seed, one in zip(seeds, made):
        if one.shape[1:] != made[0].shape[1:]:
            raise ModelError(
                "the calls make results of different sizes",
                got=f"{tuple(one.shape[1:])} from seed {seed}",
                expected=str(tuple(made[0].shape[1:])),
                fix="write the same height, width and number of frames into each call",
            )
    return torch.cat(made)


def run_together(pipeline: Any, seeds: Sequence[int], sampling: Sampling, stop: int | None) -> Tensor:
    asked = asked_of(pipeline, seeds, sampling)
    if len(asked) == 1 and isinstance(asked[0], Call):
        return result_of_call(pipeline, seeds[0], asked[0], sampling)
    return kind_of(pipeline).draw(pipeline, seeds, [str(one) for one in asked], sampling, stop)


def sample(
    pipeline: Any,
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Results of all seeds in batches; a seed gives the same one in any batch up to float rounding."""
    starts = range(0, len(seeds), batch)
    for start in (progress or Silent()).track(starts, "generating", len(starts)):
        yield run(pipeline, seeds[start : start + batch], sampling)
