"""Videos and sounds from the pipeline to the table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from stepquant.cli import main, make
from stepquant.evaluate import Twins, evaluate
from stepquant.job.calls import written_calls
from stepquant.models.sampling import Sampling
from stepquant.report import Report, table
from tests.models.pipelines import Filming, Sounding


@pytest.mark.parametrize(
    ("kind", "medium", "number"),
    [(Filming, "videos", "motion PSNR"), (Sounding, "sounds", "spectral distance")],
)
def test_what_a_pipeline_makes_is_compared(
    text_pipeline: StableDiffusionPipeline,
    kind: Any,
    medium: str,
    number: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = kind(**text_pipeline.components, requires_safety_checker=False)
    pipe.vae.register_to_config(sampling_rate=800)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        other.unet.conv_out.bias[0] += 0.1
    calls = written_calls([{"prompt": "a", "num_inference_steps": 2}])
    found = evaluate(Twins(pipe, other), Sampling(2, prompts=calls), images=2, shown=1, floor=False)
    report = Report.from_json(json.loads(json.dumps(found, allow_nan=False)))
    assert report.sampling is not None
    assert (report.sampling.medium, report.sampling.calls) == (medium, 2)
    measured = report.number(number)
    assert measured is not None
    assert measured.value is not None
    assert 0 < measured.value < 100
    assert f"2 {medium}" in str(table(report))
    monkeypatch.setattr(make, "load", lambda *_: pipe)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calls.jsonl").write_text('{"prompt": "a", "num_inference_steps": 2}')
    assert main(["generate", "model", "--images", "2", "--calls", "calls.jsonl", "--quiet"]) == 0
    written = {file.name for file in tmp_path.iterdir()}
    if medium == "videos":
        with Image.open(tmp_path / "grid.gif") as opened:
            assert opened.n_frames == 3
    assert written == {"calls.jsonl", "grid.gif" if medium == "videos" else "grid.wav"}
    assert main(
        ["generate", "model", "--images", "1", "--prompts", "calls.jsonl", "--out", "a.webp", "-q"]
    ) == (0 if medium == "videos" else 2)
