"""Kind: what a declaration says about pipelines that are asked for images in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepquant.models.sampling import Sampling


def nothing(_: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Kind:
    """How pipelines of some classes are asked for images."""

    pipelines: tuple[str, ...]  # diffusers class names
    # (pipeline, seeds, what each image is to show, sampling, where to stop early) -> images (n, 3, h, w) in [0, 1]
    draw: Callable[[Any, Sequence[int], Sequence[str], Sampling, int | None], Tensor]
    words: Callable[[Any], tuple[str, ...]] = nothing  # what images show where nobody says
