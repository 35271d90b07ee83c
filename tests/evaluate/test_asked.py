"""Truth and recognition from the pipeline to the page: a text model with a classifier and parts of the user's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from stepquant.evaluate import Twins, evaluate
from stepquant.evaluate.metrics.instruments import Weights
from stepquant.evaluate.networks.classifier import FeatureNet
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from stepquant.report import Report

PROMPTS = ("frog, red glasses", "Cat blue", "nothing known")


def test_a_text_model_is_judged_by_what_its_prompts_ask_for(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    side = run(text_pipeline, [0], Sampling(1, "ddim", PROMPTS)).shape[-1]
    net = FeatureNet((4, 4, 6), 2, side, 5, False, ("cat-blue", "frog"))
    net.head.weight.data.zero_()
    net.head.bias.data.copy_(torch.tensor([0.0, 1.0]))  # sees frogs everywhere
    save_file(
        {name: value.contiguous() for name, value in net.state_dict().items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(net.config))
    grey = np.full((2, side, side, 4), 255, np.uint8)
    grey[0, ..., :3] = 128
    np.savez(tmp_path / "parts.npz", ground=grey)
    found = evaluate(
        Twins(text_pipeline, copy.deepcopy(text_pipeline)),
        Sampling(1, "ddim", PROMPTS),
        images=8,
        batch=4,
        probed=1,
        weights=Weights(classifier=tmp_path, truth=tmp_path / "parts.npz"),
    )
    report = Report.from_json(json.loads(json.dumps(found, allow_nan=False)))
    asked = [PROMPTS[seed % 3] for seed in found["images"]["seeds"]]
    recognised, truth = (report.number(name, data=True) for name in ("recognised", "truth"))
    assert recognised is not None
    assert truth is not None
    counted = [prompt for prompt in asked if prompt != PROMPTS[2]]
    assert recognised.n == len(counted) > 0
    assert recognised.value == 100 * counted.count(PROMPTS[0]) / len(counted)
    assert recognised.reference == recognised.value
    assert (truth.n, truth.value) == (8, truth.reference)
    assert [row.name for row in report.portions] == ["ground"]
    assert report.number(f"FD ({tmp_path.name})") is not None
