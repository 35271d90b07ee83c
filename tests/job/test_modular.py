"""Folders of modular pipelines: quantized into another one, which diffusers loads as it loads the float one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline

from stepquant.errors import ModelError
from stepquant.job import benchmark
from stepquant.job.card import write_card
from stepquant.job.pipelines import load
from stepquant.job.recipe import Recipe
from stepquant.job.store import quantize_to
from stepquant.models.generate import run
from stepquant.models.pipelines.modular import ORIGIN
from stepquant.models.sampling import Sampling
from tests.models.modular import save_modular

STEPS, PROMPTS = 3, ("a a", "b")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_modular(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "small"
    recipe = Recipe.of(
        model=str(source), method="minmax", scheme="w8a8", steps=STEPS, prompts=list(PROMPTS),
        components=("unet", "text_encoder"), settings={"samples": 8},
    )  # fmt: skip
    quantize_to(recipe, out)
    return out


def test_integers_come_back_the_way_that_the_card_says(made: Path) -> None:
    code = re.search(r"```python\n(.*?)```", write_card(made).read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    told = code[1].replace("PATH-OF-THIS-FOLDER", str(made)).replace('"a prompt"', '"b"')
    told = told.replace("output=", 'output_type="pt", generator=torch.Generator().manual_seed(5), output=')
    names: dict[str, Any] = {"torch": torch}
    exec(told, names)
    assert isinstance(names["pipe"], ModularPipeline)
    assert torch.equal(names["images"], run(load(made), [5], Sampling(STEPS, prompts=("b",))))


def test_pictures_are_near_the_float_ones(source: Path, made: Path) -> None:
    exact, found = (run(load(one), [0, 1], Sampling(STEPS, prompts=PROMPTS)) for one in (source, made))
    assert 0 < float((found - exact).abs().mean()) < 0.1 * float(exact.std())


def test_the_index_names_the_folder_and_no_place_of_this_machine(source: Path, made: Path) -> None:
    text = (made / "modular_model_index.json").read_text(encoding="utf-8")
    assert str(made.parent) not in text
    assert str(source.parent) not in text
    entries = {name: entry for name, entry in json.loads(text).items() if isinstance(entry, list)}
    assert entries["unet"][2][ORIGIN] == entries["tokenizer_2"][2][ORIGIN] == "small"
    assert entries["controlnet"][2][ORIGIN] is None


def test_a_damaged_part_is_an_error_and_not_left_out(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "damaged")
    weights = next((tmp_path / "damaged" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="diffusers cannot load this pipeline"):
        load(tmp_path / "damaged")


def test_pickled_weights_are_not_loaded(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "pickled")
    part = tmp_path / "pickled" / "unet"
    for file in part.glob("*.safetensors"):
        file.unlink()
    torch.save({}, part / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights \(.bin\) are never loaded"):
        load(tmp_path / "pickled")


def test_a_copy_of_a_repository_is_read_where_it_lies_and_nothing_is_fetched(
    source: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    index = copy / "modular_model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace(str(source), "someone/model"))
    assert "someone/model" in index.read_text(encoding="utf-8")
    sampling = Sampling(STEPS, prompts=("a",))
    assert torch.equal(run(load(copy), [0], sampling), run(load(source), [0], sampling))
    shutil.rmtree(copy / "unet")
    with pytest.raises(ModelError, match="the pipeline has no denoiser"):
        load(copy)


def test_whole_generations_are_timed_by_the_prompts_and_steps_that_the_artifact_knows(
    source: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(benchmark, "first_images", lambda *asked: told.append(asked) or [])
    found = benchmark.benchmark_generation(made, str(source), batches=(2,), steps=9, seconds=0.0, count=1)
    assert found["steps"] == STEPS, "it has ranges of those steps alone"
    assert found["sampler"] == "EulerDiscreteScheduler"
    assert {row["name"] for row in found["rows"]} >= {"fp32 eager", "stepquant"}
    assert told[0][1:] == (2, STEPS, 1, PROMPTS), "so do the processes that draw the first images"


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_with_little_memory_the_folder_is_the_same(source: Path, tmp_path: Path, scheme: str) -> None:
    """By calls of networks in their files, and from file to file."""
    recipe = Recipe.of(model=str(source), method="minmax", scheme=scheme, settings={"samples": 8},
                       steps=STEPS, prompts=list(PROMPTS))  # fmt: skip
    usual, little = tmp_path / "usual" / "same", tmp_path / "little" / "same"
    quantize_to(recipe, usual)
    quantize_to(recipe, little, low_memory=True)
    names = [sorted(str(file.relative_to(one)) for file in one.rglob("*.*")) for one in (usual, little)]
    assert names[0] == names[1]
    for name in ("modular_model_index.json", *(one for one in names[0] if one.startswith("unet/"))):
        assert (usual / name).read_bytes() == (little / name).read_bytes(), name
