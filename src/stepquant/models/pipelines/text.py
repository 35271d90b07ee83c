"""Pipelines that are asked by a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stepquant.errors import ModelError
from stepquant.models import zoo
from stepquant.models.pipelines.calling import images_of
from stepquant.models.pipelines.kind import Kind
from stepquant.models.sampling import Sampling


def words(pipeline: Any) -> tuple[str, ...]:
    """An embedded model brings its own prompts."""
    return zoo.prompts(str(pipeline.config.get("_name_or_path")))


def draw(
    pipeline: Any, seeds: Sequence[int], words: Sequence[str], sampling: Sampling, _: int | None
) -> Tensor:
    if not words:
        raise ModelError(
            "this pipeline needs prompts",
            got="none",
            fix="give a file with one prompt per line: --prompts FILE",
        )
    return images_of(pipeline, seeds, sampling, prompt=list(words))


KIND = Kind(pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"), draw=draw, words=words)
