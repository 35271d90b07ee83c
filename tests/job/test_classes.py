"""A class-conditional transformer goes the whole way: recorded with both branches, quantized, saved, loaded, judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline

from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.evaluate import Twins
from stepquant.evaluate.results import generate
from stepquant.evaluate.trajectory.probe import trace
from stepquant.job import Recipe, load, quantize_to
from stepquant.job.results import describe_artifact
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent


def test_both_branches_are_recorded_the_class_first(class_pipeline: DiTPipeline, tmp_path: Path) -> None:
    source = Source(class_pipeline, Sampling(3), batch=2, cache=tmp_path)
    data = source.record(every(3, range(3)))
    records = data.take(range(len(data)))
    assert len(records) == 2 * 3 * 3
    labels = records.arguments["class_labels"]
    asked, none = labels[records.branch == 1], labels[records.branch == 0]
    assert set(asked.tolist()) == {0, 1}  # three words, two of one class
    assert set(none.tolist()) == {1000}


@pytest.mark.parametrize("method", ["minmax", "brecq"])
def test_the_whole_way(class_pipeline: DiTPipeline, tmp_path: Path, method: str) -> None:
    class_pipeline.save_pretrained(tmp_path / "model")
    settings = {"samples": 16, "trajectories": 4} | ({"iterations": 2} if method == "brecq" else {})
    recipe = Recipe.of(
        model=str(tmp_path / "model"), method=method, scheme="w8a8", settings=settings, steps=3
    )
    quantize_to(recipe, tmp_path / "made")
    twins = Twins(load(tmp_path / "model"), load(tmp_path / "made"))
    again = DiffusionPipeline.from_pretrained(tmp_path / "made")
    again.set_progress_bar_config(disable=True)
    images = run(twins.quantized, [1, 2], Sampling(3))
    assert torch.equal(images, run(again, [1, 2], Sampling(3)))
    assert (images - run(twins.float, [1, 2], Sampling(3))).abs().mean() < 0.02
    found = describe_artifact(twins, tmp_path / "made", "made")
    assert all(
        row["integer"] for row in found["coverage"] if row["role"] in ("q", "k", "v", "ff_in", "product")
    )
    assert len(trace(twins, [1], Sampling(3)).steps) == 3
    (batch,) = generate(twins, [1, 2], [3, 4], Sampling(3), 2, Silent())
    assert (list(batch.asked("float")), list(batch.asked("other"))) == (["frog", "toad"], ["cat", "frog"])
