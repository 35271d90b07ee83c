"""A pipeline that needs more than a prompt, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from stepquant.cli import main
from tests.models.pipelines import made_for, picture

Fails = Callable[..., str]


@pytest.fixture
def calls(tmp_path: Path, text_pipeline: StableDiffusionPipeline) -> Path:
    """A file of calls beside the inpainting pipeline and the pictures that they name."""
    made_for("inpainting", text_pipeline).save_pretrained(tmp_path / "float")
    picture().save(tmp_path / "hat.png")
    picture(mode="L").save(tmp_path / "mask.png")
    call = {"prompt": "a hat", "image": "hat.png", "mask_image": "mask.png", "height": 16, "width": 16}
    file = tmp_path / "calls.jsonl"
    file.write_text(json.dumps(call | {"num_inference_steps": 2}))
    return file


def test_an_inpainting_pipeline_from_its_calls_to_a_grid(calls: Path, tmp_path: Path, fails: Fails) -> None:
    out, grid = tmp_path / "out", tmp_path / "grid.png"
    quick = ("--method", "minmax", "--samples", "2", "--quiet")
    words = ["quantize", str(tmp_path / "float"), *quick, "--out", str(out)]
    assert main([*words, "--calls", str(calls), "--json", str(tmp_path / "said.json")]) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["recipe"]["steps"] == 2
    assert said["artifact_recipe"]["calls"][0]["image"]["size"] == [16, 16]
    assert (out / "samples.png").exists(), "the card is drawn with the calls"
    assert main(["generate", str(out), "--calls", str(calls), "--images", "2", "--out", str(grid), "-q"]) == 0
    with Image.open(grid) as opened:
        assert opened.width > opened.height
    assert "give them again: --calls FILE" in fails("generate", out, "--out", grid)
    assert "calls.jsonl, line 1" in fails(*words, "--calls", other(calls, "image", "none.png"))
    assert "another recipe: calls" in fails(*words, "--calls", other(calls, "prompt", "b"), "--resume")
    assert "the same thing" in fails(*words, "--calls", calls, "--steps", "3")
    assert "the same thing" in fails(*words, "--calls", calls, "--prompts", calls)


def other(calls: Path, name: str, value: str) -> Path:
    """A file beside it, of the same name, with the same calls but for one argument."""
    folder = calls.parent / f"other-{name}"
    folder.mkdir()
    for picture_file in calls.parent.glob("*.png"):
        (folder / picture_file.name).write_bytes(picture_file.read_bytes())
    (folder / calls.name).write_text(json.dumps(json.loads(calls.read_text()) | {name: value}))
    return folder / calls.name
