"""The examples that users run first, on tiny pipelines: from the float folder to the pictures and the table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMPipeline, DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from PIL import Image

from stepquant import hub

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *options: object) -> None:
    """As from the shell, in this process."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(module.parser().parse_args([str(option) for option in options]))


def integers_resemble(file: Path, columns: int, side: int) -> bool:
    """Float above, integers below: other pixels, and each picture nearer to its own float one than to that of another."""
    pixels = np.asarray(Image.open(file), dtype=float)
    assert pixels.shape == (2 * side, columns * side, 3)
    floats, integers = (np.split(row, columns, axis=1) for row in np.split(pixels, 2))
    errors = np.array([[np.abs(ours - theirs).mean() for theirs in floats] for ours in integers])
    return bool((errors.argmin(axis=1) == range(columns)).all() and (errors.diagonal() > 0).all())


def test_few_steps_of_a_text_pipeline(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_pipeline.save_pretrained(tmp_path / "float")
    run("sd15_lcm_cpu", "--model", tmp_path / "float", "--out", tmp_path / "out", "--size", 16, "--steps", 2, "--samples", 4)  # fmt: skip
    assert integers_resemble(tmp_path / "out" / "pictures.png", 3, 16)
    assert "PSNR to float" in capsys.readouterr().out
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    assert hub.config_of(pipe.unet).recipe["steps"] == 2


def test_classes_of_a_transformer(
    class_pipeline: DiTPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_pipeline.save_pretrained(tmp_path / "float")
    run("dit_classes", "--model", tmp_path / "float", "--out", tmp_path / "out", "--classes", "0,1", "--steps", 2, "--samples", 4)  # fmt: skip
    assert integers_resemble(tmp_path / "out" / "pictures.png", 2, 16)
    assert "PSNR to float" in capsys.readouterr().out
    assert hub.config_of(DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline").transformer)


def test_methods_side_by_side(
    pipeline: DDIMPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.save_pretrained(tmp_path / "float")
    run("compare_methods", "--model", tmp_path / "float", "--out", tmp_path / "out", "--methods", "minmax,ptq4dm",
        "--schemes", "w8a8", "--steps", 2, "--samples", 4, "--images", 2)  # fmt: skip
    _, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["minmax", "w8a8"], ["ptq4dm", "w8a8"]]
    first, second = ([float(line[place]) for place in (2, 4)] for line in lines)
    assert first[0] != second[0]
    assert min(first[0], second[0]) > 25
    assert first[1] == second[1]
    assert first[1] < sum(file.stat().st_size for file in (tmp_path / "float").rglob("*.safetensors")) / 2e6
