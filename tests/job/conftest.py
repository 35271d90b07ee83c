"""A tiny model on disk, and a grid of cells on it that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

from stepquant.job.compare import Cell, Evaluation, Variant, grid
from tests.conftest import make_unet

QUICK: dict[str, Any] = {"images": 5, "steps": 3, "batch": 2, "speed": 0, "probed": 2, "shown": 2}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder)
    return folder


def cells_of(
    folder: Path, *methods: str, seeds: int = 1, schemes: tuple[str, ...] = ("w8a8",), **changes: Any
) -> list[Cell]:
    """A grid; `changes` are fields of the evaluation."""
    variants = [Variant(name) for name in methods or ("minmax",)]
    evaluation = Evaluation.of(**(QUICK | changes))
    return grid(str(folder), variants, schemes, range(seeds), evaluation, settings={"samples": 8}, steps=4)


@pytest.fixture
def cells(tiny: Path) -> Callable[..., list[Cell]]:
    return partial(cells_of, tiny)
