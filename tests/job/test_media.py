"""Videos and sounds from text, and two denoisers that share the steps of one pipeline, from calls to numbers."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from stepquant import hub
from stepquant.calib.record import Source
from stepquant.cli import main
from stepquant.errors import ModelError
from stepquant.job.calls import written_calls
from stepquant.job.pipelines import check_one_denoiser, load
from stepquant.models.denoiser import Denoiser, by_denoiser, denoisers
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import Sampling
from tests.models.media import FILM, SOUND, film_pipeline, sound_pipeline

NAMES = ["transformer", "transformer_2"]
QUICK = ("--method", "minmax", "--samples", "4", "--quiet")


def made(folder: Path, pipeline: Any, call: dict[str, Any]) -> tuple[Path, Path]:
    """The artifact of a pipeline, by command, and the file of its call."""
    pipeline.save_pretrained(folder / "float")
    calls = folder / "calls.jsonl"
    calls.write_text(json.dumps(call))
    words = ["quantize", str(folder / "float"), "--calls", str(calls), "--out", str(folder / "out")]
    assert main([*words, *QUICK]) == 0
    return folder / "out", calls


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    call = {"prompt": "a hat", "num_inference_steps": 4, **FILM}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return made(tmp_path_factory.mktemp("film"), film_pipeline(), call)


def test_each_denoiser_is_an_artifact_of_its_own(film: tuple[Path, Path]) -> None:
    out, _ = film
    pipe = DiffusionPipeline.from_pretrained(out)
    configs = [hub.config_of(network) for network in denoisers(pipe).values()]
    assert list(denoisers(pipe)) == NAMES
    assert None not in configs
    assert len({config.digest for config in configs if config}) == 2
    recipes = [dict(config.recipe) for config in configs if config]
    first, second = (recipe.pop("model_digest") for recipe in recipes)
    floats = [Denoiser.of(one).digest() for one in by_denoiser(load(out.parent / "float"))]
    assert [first, second] == floats
    assert recipes[0] == recipes[1]


def test_each_denoiser_records_the_steps_that_it_runs(tmp_path: Path) -> None:
    calls = written_calls([{"prompt": "a", "num_inference_steps": 4, **FILM}])
    times = [
        Source(one, Sampling(4, prompts=calls), cache=tmp_path).times().tolist()
        for one in by_denoiser(film_pipeline())
    ]
    assert min(times[0]) >= 875 > max(times[1])
    assert len(times[0]) + len(times[1]) == 4
    late = written_calls([{"prompt": "a", "num_inference_steps": 1, **FILM}])
    with pytest.raises(ModelError, match="'transformer_2'"):
        first_arguments(by_denoiser(film_pipeline())[1], 1, late)


def test_a_film_of_two_denoisers_is_generated_measured_and_shown(film: tuple[Path, Path]) -> None:
    out, calls = film
    source = out.parent / "float"
    file, said = out.parent / "film.gif", out.parent / "said.json"
    assert main(["generate", str(out), "--images", "1", "--out", str(file), "--quiet"]) == 0
    with Image.open(file) as opened:
        assert opened.n_frames == FILM["num_frames"]
    words = ["evaluate", str(out), "--against", str(source), "--images", "2", "--no-floor", "--quiet"]
    assert main([*words, "--json", str(said)]) == 0
    found = json.loads(said.read_text())
    assert {row["name"]: row["value"] for row in found["quality"]}["motion PSNR"] > 20
    steps = found["steps"]
    assert [row["step"] for row in steps] == list(range(8)), "two branches of four steps"
    assert [row["t"] for row in steps] == sorted((row["t"] for row in steps), reverse=True)
    assert all(0 < row["relative"] < 0.1 and row["own_relative"] for row in steps)
    paths = {row["path"].partition(".")[0] for part in ("coverage", "plan") for row in found[part]}
    assert paths == set(NAMES)
    assert all(len(row["sqnr"]) == len(found["blocks"]["steps"]) for row in found["blocks"]["rows"])
    stored = sum(file.stat().st_size for name in NAMES for file in (out / name).glob("*.safetensors"))
    assert found["size"]["bytes"] == stored
    card = (out / "README.md").read_text()
    assert f"{NAMES[1]}: WanTransformer3DModel" in card
    assert "frames = pipe(" in card
    again = ["quantize", str(source), "--calls", str(calls), "--out", str(out), *QUICK, "--resume"]
    assert main([*again, "--json", str(said)]) == 0
    assert json.loads(said.read_text())["found"]
    with pytest.raises(ModelError, match="transformer, transformer_2"):
        check_one_denoiser(load(source))


def test_a_sound_from_its_call_to_numbers(tmp_path: Path) -> None:
    out, calls = made(tmp_path, sound_pipeline(), {"prompt": "a bell", **SOUND})
    file, said = tmp_path / "bell.wav", tmp_path / "said.json"
    words = [str(out), "--images", "2", "--quiet", "--calls", str(calls)]
    assert main(["generate", *words, "--out", str(file)]) == 0
    with wave.open(str(file)) as opened:
        assert (opened.getframerate(), opened.getnchannels()) == (400, 2)
        assert opened.getnframes() >= 2 * 800
    against = ["--against", str(tmp_path / "float"), "--no-floor", "--json", str(said)]
    assert main(["evaluate", *words, *against]) == 0
    found = json.loads(said.read_text())
    assert found["sampling"]["medium"] == "sounds"
    distance = {row["name"]: row["value"] for row in found["quality"]}["spectral distance"]
    assert 0 < distance < 10
