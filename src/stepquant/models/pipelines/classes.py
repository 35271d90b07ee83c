"""Pipelines that are asked for a class, by its name or its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stepquant.errors import ModelError, UnknownNameError
from stepquant.models.pipelines.calling import results_of
from stepquant.models.pipelines.kind import Kind
from stepquant.models.sampling import Sampling


def words(pipeline: Any) -> tuple[str, ...]:
    """Every class once."""
    named: dict[str, int] = pipeline.labels or {}
    return tuple(named) or tuple(map(str, range(pipeline.transformer.config.num_embeds_ada_norm)))


def number_of(word: str, pipeline: Any) -> int:
    """The class that a word names."""
    named: dict[str, int] = pipeline.labels or {}
    if word in named:
        return named[word]
    most = pipeline.transformer.config.num_embeds_ada_norm
    if not word.isdecimal():
        raise UnknownNameError("class", word, words(pipeline))
    if int(word) >= most:
        raise ModelError("there is no class of that number", got=word, expected=f"0 to {most - 1}")
    return int(word)


def draw(
    pipeline: Any, seeds: Sequence[int], words: Sequence[str], sampling: Sampling, _: int | None
) -> Tensor:
    return results_of(pipeline, seeds, sampling, class_labels=[number_of(word, pipeline) for word in words])


KIND = Kind(pipelines=("DiTPipeline",), draw=draw, words=words)
