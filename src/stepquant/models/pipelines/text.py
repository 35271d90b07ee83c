"""Pipelines that are asked by a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stepquant.errors import ModelError
from stepquant.models import zoo
from stepquant.models.pipelines.calling import WRITE_CALLS, results_of_text
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
            fix=f"give a file with one prompt per line: --prompts FILE; or {WRITE_CALLS}",
        )
    return results_of_text(pipeline, seeds, sampling, words)


KIND = Kind(pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"), draw=draw, words=words)
