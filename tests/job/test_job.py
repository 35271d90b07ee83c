"""Jobs: loading with clear errors, quantizing in place, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline

import stepquant as sq
from stepquant import hub
from stepquant.errors import (
    ArtifactError,
    MethodError,
    ModelError,
    PlanError,
    StepquantError,
    UnknownNameError,
)
from stepquant.job import Recipe, inplace, load, quantize, quantize_to
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling

QUICK = {"samples": 8, "batch": 4}


@pytest.fixture
def saved(pipeline: DDIMPipeline, tmp_path: Path) -> Path:
    """The tiny pipeline as a folder."""
    folder = tmp_path / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def recipe(model: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {"model": str(model), "method": "minmax", "settings": QUICK, "steps": 4}
    return Recipe.of(**(fields | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class TestLoad:
    def test_a_folder_gives_a_pipeline(self, saved: Path) -> None:
        assert isinstance(load(saved), DDIMPipeline)

    def test_nothing_is_warned_of(self, saved: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(saved)

    def test_a_misspelt_embedded_model_gets_the_nearest_name(self) -> None:
        with pytest.raises(ModelError, match="did you mean 'stepquant:characters'"):
            load("stepquant:charcaters")

    def test_an_unknown_model(self) -> None:
        with pytest.raises(ModelError, match="there is no model 'nowhere'"):
            load("nowhere")

    def test_a_name_of_the_hub_says_how_to_fetch_it(self) -> None:
        with pytest.raises(ModelError, match="hf download someone/something"):
            load("someone/something")

    def test_a_folder_that_is_no_pipeline(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no diffusers pipeline"):
            load(tmp_path)

    def test_a_component_points_to_the_folder_above(self, saved: Path) -> None:
        with pytest.raises(ModelError, match=f"give the folder above it: {saved}"):
            load(saved / "unet")

    def test_a_pipeline_with_a_missing_file(self, saved: Path) -> None:
        (saved / "unet" / "config.json").unlink()
        with pytest.raises(ModelError, match="cannot load this pipeline"):
            load(saved)

    def test_weights_that_are_not_finite(self, pipeline: DDIMPipeline, tmp_path: Path) -> None:
        with torch.no_grad():
            pipeline.unet.conv_out.weight[0, 0, 0, 0] = float("nan")
        pipeline.save_pretrained(tmp_path / "nan")
        with pytest.raises(ModelError, match=r"conv_out\.weight"):
            load(tmp_path / "nan")

    def test_a_device_that_is_not_there(self, saved: Path) -> None:
        with pytest.raises(StepquantError, match="cannot use device 'toaster'"):
            load(saved, "toaster")


class TestRecipe:
    def test_an_unknown_key_gets_the_nearest_name(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'sampler'"):
            Recipe.of(samplr="ddim")

    def test_a_value_that_does_not_fit_names_its_key(self) -> None:
        with pytest.raises(StepquantError, match="'steps' of the recipe"):
            Recipe.of(steps=0)

    @pytest.mark.parametrize(
        ("changes", "near"),
        [
            ({"method": "minmx"}, "minmax"),
            ({"scheme": "w8a"}, "w8a8"),
            ({"sampler": "dimm"}, "ddim"),
            ({"settings": {"sampels": 4}}, "samples"),
        ],
    )
    def test_names_are_checked_before_any_work(self, changes: dict[str, Any], near: str) -> None:
        with pytest.raises(UnknownNameError, match=f"did you mean.*'{near}'"):
            Recipe.of(**({"method": "minmax"} | changes)).check()

    def test_text_becomes_the_type_of_the_field(self) -> None:
        assert Recipe.of(method="minmax", settings={"samples": "12"}).build_method().samples == 12

    def test_text_that_cannot(self) -> None:
        with pytest.raises(MethodError, match="field 'samples'"):
            Recipe.of(method="minmax", settings={"samples": "many"}).build_method()

    def test_a_plan_comes_before_the_scheme_and_stands_alone_without_one(self) -> None:
        plan = {"name": "mine", "rules": [{"grid": "float", "path": "conv_out"}]}
        with_scheme = Recipe.of(plan=plan, scheme="w8a8").build_plan()
        assert with_scheme.name == "mine+w8a8"
        assert with_scheme.rules[0].path == "conv_out"
        assert len(Recipe.of(plan=plan).build_plan().rules) == 1
        assert Recipe.of().build_plan().name == "w8a8"


class TestQuantize:
    def test_the_pipeline_runs_in_integers_and_comes_back_from_disk_the_same(
        self, pipeline: DDIMPipeline, tmp_path: Path
    ) -> None:
        quantize(pipeline, method="minmax", scheme="w8a8", samples=8, steps=4)
        assert hub.config_of(pipeline.unet) is not None
        pipeline.save_pretrained(tmp_path / "out")
        again = DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert torch.equal(run(pipeline, [0, 1], Sampling(3)), run(again, [0, 1], Sampling(3)))

    @pytest.mark.parametrize("method", ["minmax", "minmax+d2dpm"])
    def test_the_artifact_is_the_same_where_float_weights_go_early(
        self, pipeline: DDIMPipeline, method: str
    ) -> None:
        """A correction needs them once more, and they stay until then."""
        settings = {"minmax.samples": 8, "d2dpm.trajectories": 4} if "+" in method else {"samples": 8}
        asked = Recipe.of(model="DDIMPipeline", method=method, settings=settings, steps=4)
        expected = inplace.run(pipeline, asked)
        assert pipeline.unet.mid_block.resnets[0].conv1.weight.isfinite().all()
        made = inplace.run_all(pipeline, asked)["unet"]
        assert made.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(made.tensors[name], expected.tensors[name]) for name in made.tensors)
        gone = pipeline.unet.mid_block.resnets[0].conv1.weight.isnan().all()
        assert gone == (method == "minmax")

    def test_twice_is_an_error(self, pipeline: DDIMPipeline) -> None:
        quantize(pipeline, method="minmax", samples=8, steps=4)
        with pytest.raises(ModelError, match="quantized already"):
            quantize(pipeline, method="minmax", samples=8, steps=4)

    def test_a_failure_leaves_the_model_as_it_was(self, pipeline: DDIMPipeline) -> None:
        before = run(pipeline, [0], Sampling(3))
        with pytest.raises(PlanError, match="has no effect"):
            quantize(
                pipeline,
                method="minmax",
                plan={"rules": [{"grid": "float", "path": "nowhere"}]},
                scheme="w8a8",
                steps=4,
            )
        assert torch.equal(run(pipeline, [0], Sampling(3)), before)

    def test_the_package_offers_it(self) -> None:
        assert sq.quantize is quantize
        assert sq.load is load
        with pytest.raises(AttributeError, match="nothing"):
            _ = sq.nothing


class TestQuantizeTo:
    def test_an_ordinary_folder(self, saved: Path, tmp_path: Path) -> None:
        outcome = quantize_to(recipe(saved), tmp_path / "out")
        assert {path.name for path in outcome.out.iterdir()} == {"model_index.json", "unet", "scheduler"}
        assert not outcome.found
        assert 0 < outcome.weights_bytes < outcome.float_bytes
        assert not list(tmp_path.glob(".*.part"))

    def test_the_same_recipe_gives_the_same_bytes(self, saved: Path, tmp_path: Path) -> None:
        first = quantize_to(recipe(saved), tmp_path / "a" / "out")
        second = quantize_to(recipe(saved), tmp_path / "b" / "out")
        assert contents(first.out) == contents(second.out)

    def test_no_path_of_this_machine_is_written(self, saved: Path, tmp_path: Path) -> None:
        out = quantize_to(recipe(saved), tmp_path / "out").out
        text = [file for name, file in contents(out).items() if not name.endswith((".png", ".safetensors"))]
        assert not any(str(tmp_path).encode() in data for data in text)

    def test_nor_by_the_other_components(self, text_pipeline: Any, tmp_path: Path) -> None:
        text_pipeline.save_pretrained(tmp_path / "secret" / "tiny")
        load(tmp_path / "secret" / "tiny").save_pretrained(tmp_path / "again")
        text = [data for name, data in contents(tmp_path / "again").items() if name.endswith(".json")]
        assert not any(b"secret" in data for data in text)

    def test_provenance(self, saved: Path, tmp_path: Path) -> None:
        out = quantize_to(recipe(saved, seed=5), tmp_path / "out").out
        kept = json.loads((out / "unet" / "config.json").read_text())["quantization_config"]["recipe"]
        assert kept["method"] == "minmax"
        assert kept["seed"] == 5
        assert kept["settings"]["samples"] == 8
        assert kept["model"] == "tiny"
        assert set(kept["versions"]) == {"stepquant", "torch", "diffusers"}
        assert all(rule["reason"] for rule in kept["plan"])

    def test_a_folder_that_exists_is_not_touched(self, saved: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        with pytest.raises(StepquantError, match="exists already"):
            quantize_to(recipe(saved), tmp_path / "out")
        assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}

    def test_resume_keeps_a_finished_artifact(self, saved: Path, tmp_path: Path) -> None:
        first = quantize_to(recipe(saved), tmp_path / "out")
        before = contents(first.out)
        assert quantize_to(recipe(saved), tmp_path / "out", resume=True).found
        assert contents(first.out) == before

    def test_resume_refuses_another_recipe_and_says_what_differs(self, saved: Path, tmp_path: Path) -> None:
        quantize_to(recipe(saved), tmp_path / "out")
        with pytest.raises(ArtifactError, match="another recipe: seed"):
            quantize_to(recipe(saved, seed=1), tmp_path / "out", resume=True)

    def test_resume_refuses_a_damaged_artifact(self, saved: Path, tmp_path: Path) -> None:
        out = quantize_to(recipe(saved), tmp_path / "out").out
        weights = out / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(StepquantError, match="diffusion_pytorch_model.safetensors"):
            quantize_to(recipe(saved), tmp_path / "out", resume=True)


class TestTextModels:
    def test_prompts_are_needed(self, text_pipeline: Any) -> None:
        with pytest.raises(ModelError, match="--prompts"):
            quantize(text_pipeline, method="minmax", settings=QUICK, steps=3)

    def test_with_prompts_it_runs_in_integers(self, text_pipeline: Any, tmp_path: Path) -> None:
        text_pipeline.save_pretrained(tmp_path / "text")
        chosen = recipe(tmp_path / "text", prompts=("a cat", "a dog"), steps=3)
        out = quantize_to(chosen, tmp_path / "out").out
        config = hub.config_of(load(out).unet)
        assert config is not None
        assert config.recipe["prompts"] == ["a cat", "a dog"]
        assert len(config.layers) > 20


class TestWriting:
    def test_a_full_disk_leaves_nothing_behind(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        load(saved)
        monkeypatch.setattr("stepquant.job.files.os.replace", full)
        with pytest.raises(StepquantError, match="No space left on device") as caught:
            quantize_to(recipe(saved), tmp_path / "deep" / "out")
        assert "--resume" in str(caught.value)
        assert not list((tmp_path / "deep").iterdir())

    def test_no_permission(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("pathlib.Path.mkdir", refuse)
        with pytest.raises(StepquantError, match="Permission denied"):
            quantize_to(recipe(saved), tmp_path / "out")

    def test_a_file_in_the_way_fails_before_any_work(self, saved: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(StepquantError, match="in the way"):
            quantize_to(recipe(saved), tmp_path / "out")
