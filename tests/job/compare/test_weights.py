"""Networks that measure, through a comparison: they reach every cell, their digests decide its name, bad files stop it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, StableDiffusionPipeline, UNet2DModel
from safetensors.torch import save_file

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics import instruments
from stepquant.evaluate.metrics.instruments import Weights
from stepquant.evaluate.metrics.measure import as_saved
from stepquant.evaluate.networks.lpips import load_lpips
from stepquant.job.compare import Cell, Evaluation, Inline, Processes, Variant, cluster, compare, grid
from stepquant.job.compare.cell import Origin
from stepquant.job.compare.executor import Finished
from stepquant.job.compare.measure import read_images
from stepquant.job.compare.query import cell_row
from stepquant.job.pipelines import load
from stepquant.models.generate import asked_of
from tests.conftest import make_unet
from tests.evaluate.metrics.test_quality import Wide
from tests.evaluate.networks.test_clip import make_clip
from tests.evaluate.networks.test_lpips import alex_state
from tests.job.compare.test_compare import numbers
from tests.job.conftest import QUICK

Make = Callable[..., list[Cell]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of LPIPS and of CLIP, random, and a file that is not those of Inception."""
    where = tmp_path_factory.mktemp("weights")
    save_file({"none": torch.zeros(1)}, where / "inception.safetensors")
    save_file(alex_state(), where / "lpips.safetensors")
    make_clip(where / "clip")
    return where


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline whose images LPIPS can read."""
    folder = tmp_path_factory.mktemp("models") / "tiny32"
    unet = UNet2DModel.from_config(dict(make_unet().config) | {"sample_size": 32}).eval()
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def cells(model: Path) -> Make:
    def make(
        folder: Path = model, data: str | None = None, prompts: Any = None, **weights: Path
    ) -> list[Cell]:
        chosen = Evaluation.of(**QUICK | {"images": 3, "steps": 2}, data=data, weights=Weights(**weights))
        recipe = {"settings": {"samples": 8}, "steps": 4, "prompts": prompts}
        return grid(str(folder), [Variant("minmax")], ["w8a8"], [0], chosen, **recipe)

    return make


def key(cells: list[Cell]) -> str:
    return Origin.of(load(cells[0].recipe.model), cells).cell_key(cells[0], "artifact")


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {number["name"]: number for number in reversed(found["quality"])}  # the first of a name


class Elsewhere(Inline):
    """Every task as a node of a cluster has it: files as bytes, nothing of this disk."""

    def __init__(self, hidden: Path) -> None:
        super().__init__()
        self.hidden = hidden

    def wait(self) -> Finished:
        task = self.waiting.popleft()
        sent = [cluster.pack(path) for path in task.reads.values()]
        places = [(name, path.name) for name, path in task.reads.items()]
        away = self.hidden.rename(self.hidden.with_name("hidden"))
        text, threads = task.model_dump_json(), torch.get_num_threads()
        made, error, kind = cluster.perform_here(text, places, threads, *sent)
        away.rename(self.hidden)
        cluster.unpack(made, task.out)
        return Finished(task, error, kind)


def test_they_reach_every_cell_wherever_it_is_measured(cells: Make, files: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(files / "lpips.safetensors", mine)
    threads, asked = torch.get_num_threads(), cells(lpips=mine / "lpips.safetensors")
    executors = {"here": Inline(), "apart": Processes(threads=threads), "there": Elsewhere(mine)}
    found = {
        name: compare(asked, tmp_path / name, executor=executor).results[0]
        for name, executor in executors.items()
    }
    for name in ("apart", "there"):
        assert numbers([found[name]]) == numbers([found["here"]]), found[name].get("error")
    number = by_name(found["here"])["LPIPS"]
    assert number["value"] > 0
    assert number["extractor"] == load_lpips(files / "lpips.safetensors").digest


def test_inception_brings_its_numbers(
    cells: Make, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small network in its place: distances of the whole one take seconds each."""
    monkeypatch.setattr(instruments, "load_inception", lambda file: Wide())
    asked = cells(inception=files / "inception.safetensors")
    (found,) = compare(asked, tmp_path, executor=Inline()).results
    known = by_name(found)
    for name in ("FID", "sFID", "IS"):
        assert (known[name]["extractor"], known[name]["resize"]) == (Wide.digest, Wide.resize)
    row = cell_row("x", asked[0].model_dump(mode="json") | {"scheme": ""}, found)
    assert row["fid_float"] == next(x["value"] for x in found["quality"] if x["name"] == "FID") > 0
    assert row["fid_float_extractor"] == Wide.digest
    page = (tmp_path / "compare.html").read_text()
    assert f"3 images, DDIMScheduler, 2 calls, network w1, {Wide.resize}" in page
    assert "sFID" in page


def test_a_worker_reads_its_own_copies(tmp_path: Path) -> None:
    """Networks and a file of statistics travel; a folder of images must be there."""
    paths = {name: Path(f"mine/{name}") for name in ("inception", "lpips", "clip", "classifier", "truth")}
    chosen = Evaluation.of(data="mine/data.npz", weights=Weights(**paths))
    assert chosen.files() == paths | {"data": Path("mine/data.npz")}
    there = chosen.reading({name: tmp_path / name for name in chosen.files()} | {"model": tmp_path})
    assert there.weights == Weights(*(tmp_path / name for name in paths))
    assert there.data == str(tmp_path / "data")
    for data in ("photos", "cifar10", "characters", None):
        same = Evaluation.of(data=data)
        assert same.files() == {}
        assert same.reading({"model": tmp_path}) == same


def test_page_and_tables_name_the_network_or_what_to_give(cells: Make, files: Path, tmp_path: Path) -> None:
    (given,) = compare(cells(lpips=files / "lpips.safetensors"), tmp_path / "a", executor=Inline()).results
    (bare,) = compare(cells(), tmp_path / "b", executor=Inline()).results
    digest = by_name(given)["LPIPS"]["extractor"]
    page, words = ((tmp_path / "a" / f"compare.{kind}").read_text() for kind in ("html", "md"))
    assert f"network {digest}" in page
    assert f"- LPIPS: 3 images, DDIMScheduler, 2 calls, network {digest}" in words
    assert "LPIPS (float, same seeds)" in words
    page, words = ((tmp_path / "b" / f"compare.{kind}").read_text() for kind in ("html", "md"))
    assert "- LPIPS unavailable: give --lpips PATH" in words
    assert "LPIPS (float, same seeds)" not in words
    assert 'LPIPS ↓</button><small class="why">unavailable: give --lpips PATH</small>' in page
    known = cells()[0].model_dump(mode="json") | {"scheme": ""}
    rows = [cell_row("x", known, found) for found in (given, bare)]
    assert rows[0]["lpips_float"] == by_name(given)["LPIPS"]["value"]
    assert rows[0]["lpips_float_extractor"] == digest
    assert "lpips_float_unavailable" not in rows[0]
    assert rows[1]["lpips_float"] is None
    assert rows[1]["lpips_float_unavailable"] == "give --lpips PATH"
    assert rows[1]["sampler"] == "DDIMScheduler"


def test_another_file_is_another_cell_and_another_place_is_not(
    cells: Make, files: Path, tmp_path: Path
) -> None:
    bare, given = key(cells()), key(cells(lpips=files / "lpips.safetensors"))
    shutil.copy(files / "lpips.safetensors", tmp_path / "copy.safetensors")
    state = alex_state()
    state["lin0.model.1.weight"][0] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    assert key(cells(lpips=tmp_path / "copy.safetensors")) == given
    assert len({bare, given, key(cells(lpips=tmp_path / "other.safetensors"))}) == 3


def test_other_data_are_another_cell(cells: Make, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"one")
    first = key(cells(data=str(photos)))
    (photos / "b.png").write_bytes(b"two")
    assert len({first, key(cells(data=str(photos))), key(cells())}) == 3


def test_prompts_come_with_their_images(
    text_pipeline: StableDiffusionPipeline, cells: Make, files: Path, tmp_path: Path
) -> None:
    """The score of a cell is that of its images and of the prompts that they were made of."""
    text_pipeline.save_pretrained(tmp_path / "model")
    asked = cells(tmp_path / "model", prompts=("a cat", "dogs", "the sea"), clip=files / "clip")
    (found,) = compare(asked, tmp_path / "out", executor=Inline()).results
    (score,) = [x for x in found["quality"] if x["name"] == "CLIP score"]
    (place,) = {file.parent for file in (tmp_path / "out" / "floats").glob("*/*") if is_of(file, asked[0])}
    clip = instruments.load_clip(files / "clip")
    expected = [
        clip(
            as_saved(read_images(place / f"{number:05d}.safetensors")),
            asked_of(text_pipeline, asked[0].evaluation.seeds(0, number), asked[0].sampling),
        )
        for number in range(2)
    ]
    assert score["reference"] == pytest.approx(float(torch.cat(expected).mean()), abs=1e-6)
    assert (score["n"], score["extractor"]) == (3, clip.digest)


def is_of(file: Path, cell: Cell) -> bool:
    return file.parent.name == Origin.of(load(cell.recipe.model), [cell]).images_key(cell, 0)


@pytest.mark.parametrize(
    ("weights", "data", "said"),
    [
        ({"inception": "inception.safetensors"}, None, "does not hold the weights of the FID's InceptionV3"),
        ({"lpips": "none.safetensors"}, None, "No such file"),
        ({"clip": "clip"}, None, "there are none"),
        ({}, "nowhere", "no images to compare with"),
        ({}, "none.npz", "cannot read the file"),
    ],
)
def test_bad_files_stop_it_before_the_first_cell(
    cells: Make, files: Path, tmp_path: Path, weights: dict[str, str], data: str | None, said: str
) -> None:
    given = {name: files / path for name, path in weights.items()}
    asked = cells(data=data and str(tmp_path / data), **given)
    with pytest.raises(EvaluationError, match=said):
        compare(asked, tmp_path / "out", executor=Inline())
    assert not (tmp_path / "out" / "cells").exists()
    assert not (tmp_path / "out" / "artifacts").exists()
