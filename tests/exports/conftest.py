"""Tiny artifacts that every export may be made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepquant.calib.record import Source
from stepquant.hub import StepquantConfig
from tests.crafted import save
from tests.foreign.test_convert import tiny

Make = Callable[..., tuple[Any, dict[str, Any], Path]]


@pytest.fixture
def rounded(tmp_path: Path) -> Make:
    """A tiny network of the table of cases, rounded while it is loaded: itself, arguments of a call, its folder."""

    def make(name: str, scheme: str = "w8a8-dynamic", rotation: int | None = None) -> Any:
        model, given = tiny(name)
        model.save_pretrained(tmp_path / "float")
        config = StepquantConfig(scheme, rotation=rotation)
        made = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
        made.save_pretrained(tmp_path / "artifact")
        return made, given, tmp_path / "artifact"

    return make


@pytest.fixture
def calibrated(source: Source, tmp_path: Path) -> Path:
    """The folder of a U-Net with ranges of activations."""
    return save(source, tmp_path / "pipeline")
