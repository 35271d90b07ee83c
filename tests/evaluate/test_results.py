from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from PIL import Image

from stepquant import hub, methods
from stepquant.artifact import Artifact
from stepquant.calib.record import Source, trajectory_seed
from stepquant.errors import EvaluationError
from stepquant.evaluate import evaluate
from stepquant.evaluate.metrics.frechet import Statistics
from stepquant.evaluate.metrics.pairs import psnr
from stepquant.evaluate.metrics.reference import read_data
from stepquant.evaluate.networks.reader import Extractor
from stepquant.evaluate.twins import Twins
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme


@pytest.fixture
def artifact(pipeline: DDIMPipeline, source: Source) -> Artifact:
    found = methods.build("minmax", {"samples": 4})(Denoiser.of(pipeline), scheme("w4a8"), source)
    recipe = {"method": "minmax", "scheme": "w4a8", "plan": scheme("w4a8").to_json()["rules"], "seed": 0}
    return dataclasses.replace(found, recipe=recipe)


@pytest.fixture
def quantized(pipeline: DDIMPipeline, artifact: Artifact) -> DDIMPipeline:
    other = copy.deepcopy(pipeline)
    hub.attach(other.unet, artifact)
    return other


def test_results_are_plain_json_about_the_same_seeds(pipeline: DDIMPipeline, quantized: DDIMPipeline) -> None:
    found = evaluate(Twins(pipeline, quantized), Sampling(3, "ddim"), images=6, batch=4, shown=3, probed=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found

    seeds = found["images"]["seeds"]
    first, second = run(pipeline, seeds, Sampling(3, "ddim")), run(quantized, seeds, Sampling(3, "ddim"))
    shown = np.stack(
        [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for x in found["images"]["quantized"]]
    )
    assert np.abs(shown.transpose(0, 3, 1, 2) / 255 - second.numpy()).max() <= 0.5 / 255 + 0.01
    assert psnr(first, second).mean() < 60  # they do differ
    assert found["sampling"] | {"batch": 4} == {
        "sampler": "ddim", "steps": 3, "calls": 3, "seed": 0, "images": 6, "batch": 4, "size": [8, 8],
        "medium": "images",
    }  # fmt: skip


def test_every_number_says_of_what_it_is(pipeline: DDIMPipeline, quantized: DDIMPipeline) -> None:
    found = evaluate(Twins(pipeline, quantized), Sampling(2), images=6, batch=4, probed=2)
    numbers = {x["name"]: x for x in found["quality"]}
    assert numbers["PSNR"]["n"] == 6
    assert numbers["PSNR"]["low"] < numbers["PSNR"]["value"] < numbers["PSNR"]["high"]
    assert numbers["PSNR"]["floor"] < numbers["PSNR"]["value"]
    for name in ("SSIM", "FD-CH", "LPIPS", "FID"):  # 8 pixels are too few, and weights are missing
        assert numbers[name]["value"] is None
        assert numbers[name]["unavailable"]
    assert found["quantized"]["scheme"] == "w4a8"
    assert {row["path"] for row in found["plan"]} == {row["path"] for row in found["coverage"]}


def test_a_model_compared_with_itself_is_perfect(pipeline: DDIMPipeline) -> None:
    found = evaluate(Twins(pipeline, copy.deepcopy(pipeline)), Sampling(2), images=2, floor=False, probed=1)
    assert found["quality"][0]["value"] == 100
    assert found["quality"][0]["floor"] is None
    assert [row["relative"] for row in found["steps"]] == [0, 0]


def test_evaluation_never_generates_what_was_calibrated_on(pipeline: DDIMPipeline) -> None:
    found = evaluate(
        Twins(pipeline, copy.deepcopy(pipeline)), Sampling(1), images=2, floor=False, probed=1, seed=3
    )
    calibrated = {trajectory_seed(seed, i) for seed in range(5) for i in range(20_000)}
    assert not calibrated & set(found["images"]["seeds"])


@pytest.mark.parametrize(("wrong", "message"), [((1, 1), "2 to"), ((4, 0), "one step")])
def test_impossible_requests_are_named(pipeline: DDIMPipeline, wrong: tuple[int, int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate(Twins(pipeline, pipeline), Sampling(wrong[1]), images=wrong[0])


def test_a_pipeline_quantized_in_place_has_no_float_twin(pipeline: DDIMPipeline) -> None:
    with pytest.raises(EvaluationError, match="same denoiser"):
        evaluate(Twins(pipeline, pipeline), Sampling(1), images=2)


def test_data_may_be_a_folder_of_images(extractor: Extractor, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    expected = Statistics.of(extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255))
    found = read_data(str(tmp_path), extractor)["FD-C10"]
    torch.testing.assert_close(found.blocks[0].outer, expected.outer)
    assert found.features is not None
    assert len(found.features) == 5

    Image.fromarray(pixels[0, :16]).save(tmp_path / "9.png")
    with pytest.raises(EvaluationError, match="differ in size"):
        read_data(str(tmp_path), extractor)
    (tmp_path / "9.png").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match="cannot read the image"):
        read_data(str(tmp_path), extractor)
    with pytest.raises(EvaluationError, match="no images to compare"):
        read_data(str(tmp_path / "nothing"), extractor)
    with pytest.raises(EvaluationError, match="trained on"):
        read_data(None, extractor)
