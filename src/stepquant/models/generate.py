"""Images of any pipeline: seeds in, images out, one seed per trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from stepquant.models.pipelines.registry import kind_of
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent


def words_of(pipeline: Any, sampling: Sampling) -> tuple[str, ...]:
    """All that the images of a pipeline are to show, in turn; nothing where it cannot be asked."""
    return sampling.prompts or kind_of(pipeline).words(pipeline)


def asked_of(pipeline: Any, seeds: Sequence[int], sampling: Sampling) -> list[str]:
    """What the image of every seed is to show."""
    words = words_of(pipeline, sampling)
    return [words[int(seed) % len(words)] for seed in seeds] if words else []


def run(pipeline: Any, seeds: Sequence[int], sampling: Sampling, stop: int | None = None) -> Tensor:
    """Images (n, 3, h, w) in [0, 1] of one batch of seeds."""
    return kind_of(pipeline).draw(pipeline, seeds, asked_of(pipeline, seeds, sampling), sampling, stop)


def sample(
    pipeline: Any,
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Images of all seeds in batches; a seed gives the same image in any batch up to float rounding."""
    starts = range(0, len(seeds), batch)
    for start in (progress or Silent()).track(starts, "generating", len(starts)):
        yield run(pipeline, seeds[start : start + batch], sampling)
