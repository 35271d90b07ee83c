"""First images and memory are those of a process that does nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

from stepquant.errors import EvaluationError
from stepquant.job.fresh_process import first_images
from tests.models.tiny import unconditional


def test_a_child_tells_seconds_and_bytes(tmp_path: Path) -> None:
    DDIMPipeline(unconditional(), DDIMScheduler()).save_pretrained(tmp_path / "tiny")
    ballast = bytearray(1 << 30)
    ballast[:: 1 << 12] = b"x" * (1 << 18)  # resident here, and nothing of it in the child
    (row,) = first_images({"bf16": (str(tmp_path / "tiny"), "bf16")}, 1, 2, 1)
    assert (row["name"], row["batch"], row["steps"]) == ("bf16", 1, 2)
    assert row["load_seconds"] > 0 < row["first_image_seconds"]
    assert 50e6 < row["start_bytes"] <= row["peak_bytes"] < len(ballast)
    with pytest.raises(EvaluationError, match="fp32"):
        first_images({"fp32": (str(tmp_path / "missing"), "fp32")}, 1, 2, 1)
