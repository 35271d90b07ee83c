"""Quantized models live like others: diffusers' own checks of a backend, on a U-Net, a DiT and an MM-DiT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contracts.life import CHECKS, Life

FAMILIES = ("text_to_image", "class_transformer", "sd3")


@pytest.fixture(scope="module", params=FAMILIES)
def life(request: pytest.FixtureRequest) -> Life:
    return Life(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_quantized_model_passes(life: Life, check: Callable[[Life, Path], None], tmp_path: Path) -> None:
    check(life, tmp_path)
