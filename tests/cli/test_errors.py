"""When things go wrong: one clear error that names the nearest thing, exit code 2 for the user's input, 1 for ours."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTTransformer2DModel, VQModel
from safetensors.torch import load_file, save_file

from stepquant.cli import main
from tests.cli.conftest import QUICK

Fails = Callable[..., str]


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("--method", "minmx"), "'minmax'"),
        (("--scheme", "w8a"), "'w8a8'"),
        (("--sampler", "dimm"), "'ddim'"),
        (("--set", "sampels=3"), "'samples'"),
    ],
)
def test_unknown_names_get_the_nearest(
    tiny: Path, tmp_path: Path, fails: Fails, words: tuple[str, str], near: str
) -> None:
    said = fails("quantize", tiny, "--out", tmp_path / "out", "--method", "minmax", *words)
    assert f"did you mean {near}" in said


def test_an_unknown_embedded_model(tmp_path: Path, fails: Fails) -> None:
    for former in ("stepquant:cifar10", "stepquant:character"):
        assert "stepquant:characters" in fails("quantize", former, "--out", tmp_path / "out")


def test_an_unknown_command_and_an_unknown_option(fails: Fails) -> None:
    assert "quantize" in fails("quantise")
    assert "--scheme" in fails("quantize", "--sheme", "w8a8")


@pytest.mark.parametrize(
    "words",
    [
        ("--set", "batch"),
        ("--set", "batch=many"),
        ("--steps", "0"),
        ("--samples", "2", "--set", "samples=3"),
        ("--set", "batch=1", "--set", "batch=2"),
        ("--device", "toaster"),
        ("--prompts", "nowhere.txt"),
        ("--plan", "nowhere.json"),
    ],
)
def test_unfit_values(tiny: Path, tmp_path: Path, fails: Fails, words: tuple[str, ...]) -> None:
    assert fails("quantize", tiny, "--method", "minmax", "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", "--images", "1", "--steps", "2000"), "1 to 1000"),
        (("generate", "--images", "1", "--steps", "1", "--json", "."), "cannot write '.'"),
        (("benchmark", "--chart", "bars.png"), "ends in .svg"),
        (("evaluate", "--data", "nowhere"), "no such folder"),
    ],
)
def test_unfit_values_are_noticed_before_any_work(
    artifact: Path, tiny: Path, tmp_path: Path, fails: Fails, words: tuple[str, ...], said: str
) -> None:
    command, *rest = words
    against = () if command == "generate" else ("--against", tiny)
    out = ("--out", tmp_path / "x.png") if command == "generate" else ()
    assert said in fails(command, artifact, *rest, *against, *out)
    assert not (tmp_path / "x.png").exists()


def test_prompts_for_a_model_without_text(tiny: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    words = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    assert "takes no text" in fails("quantize", tiny, *QUICK, *words)


def test_pickled_weights_are_not_loaded(pipeline: DDIMPipeline, tmp_path: Path, fails: Fails) -> None:
    pipeline.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert "pickled weights (.bin) are never loaded" in fails("generate", tmp_path / "old")


def test_models_that_are_not_there_or_not_supported(tmp_path: Path, fails: Fails) -> None:
    assert "cifar10-features" not in fails("generate", "nowhere")
    assert "no such artifact" in fails("report", tmp_path / "nowhere")
    DDIMPipeline(VQModel(block_out_channels=(32,)), DDIMScheduler()).save_pretrained(tmp_path / "coder")
    assert "VQModel are not supported" in fails("generate", tmp_path / "coder")


def test_a_pipeline_that_asks_its_model_for_nothing_needs_one_that_can_do_without(
    tmp_path: Path, fails: Fails
) -> None:
    model = DiTTransformer2DModel(1, 8, 4, num_layers=1, sample_size=4)
    DDIMPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    assert "DDIMPipeline does not fit its model" in fails("generate", tmp_path / "dit")


def test_a_folder_that_is_no_pipeline(tmp_path: Path, fails: Fails) -> None:
    assert "no diffusers pipeline" in fails("generate", tmp_path)


def test_a_plan_rule_without_effect_is_named(tiny: Path, tmp_path: Path, fails: Fails) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"name": "mine", "rules": [{"grid": "float", "path": "nowhere.*"}]}')
    said = fails("quantize", tiny, *QUICK, "--scheme", "w8a8", "--plan", plan, "--out", tmp_path / "out")
    assert "rule 0" in said
    assert "nowhere" in said


def test_weights_that_are_not_finite_are_named(pipeline: DDIMPipeline, tmp_path: Path, fails: Fails) -> None:
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] = float("inf")
    pipeline.save_pretrained(tmp_path / "inf")
    assert "conv_in.bias" in fails("quantize", tmp_path / "inf", "--out", tmp_path / "out")


def test_activations_that_are_not_finite_name_their_layer(
    pipeline: DDIMPipeline, tmp_path: Path, fails: Fails
) -> None:
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight.mul_(1e30)
        pipeline.unet.mid_block.resnets[0].norm2.weight.mul_(1e38)
    pipeline.save_pretrained(tmp_path / "wild")
    said = fails("quantize", tmp_path / "wild", *QUICK, "--out", tmp_path / "out")
    assert "not finite" in said
    assert not (tmp_path / "out").exists()


class TestDamagedArtifacts:
    @pytest.fixture
    def damaged(self, artifact: Path, tmp_path: Path) -> Path:
        shutil.copytree(artifact, tmp_path / "damaged")
        return tmp_path / "damaged"

    def edit(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        change(tensors)
        save_file(tensors, file, metadata)

    def test_an_edited_tensor_is_named(self, damaged: Path, fails: Fails) -> None:
        self.edit(damaged, lambda tensors: tensors["conv_in.weight_scale"].mul_(1.001))
        assert "conv_in.weight_scale" in fails("generate", damaged)

    def test_a_missing_tensor_is_named(self, damaged: Path, fails: Fails) -> None:
        self.edit(damaged, lambda tensors: tensors.pop("conv_out.weight"))
        assert "conv_out.weight" in fails("generate", damaged)

    def test_a_foreign_tensor_is_named(self, damaged: Path, fails: Fails) -> None:
        self.edit(damaged, lambda tensors: tensors.update(surprise=torch.ones(1)))
        assert "surprise" in fails("generate", damaged)

    def test_a_truncated_tensor_is_named(self, damaged: Path, fails: Fails) -> None:
        def cut(tensors: dict[str, torch.Tensor]) -> None:
            tensors["conv_in.weight"] = tensors["conv_in.weight"][:-1].clone()

        self.edit(damaged, cut)
        assert "conv_in.weight" in fails("generate", damaged)

    def test_a_truncated_file_is_named(self, damaged: Path, fails: Fails) -> None:
        file = damaged / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        assert file.name in fails("generate", damaged)

    def test_an_edited_recipe_is_noticed_by_resume(self, damaged: Path, tiny: Path, fails: Fails) -> None:
        config = damaged / "unet" / "config.json"
        config.write_text(config.read_text().replace('"momentum": 0.9', '"momentum": 0.8'))
        assert fails("quantize", tiny, *QUICK, "--out", damaged, "--resume")


class TestTheSystemRefuses:
    def refuse(self, number: int) -> Callable[..., None]:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        return refuse

    def test_a_full_disk_while_recording(
        self, tiny: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stepquant.calib.record.save_file", self.refuse(errno.ENOSPC))
        said = fails("quantize", tiny, *QUICK, "--out", tmp_path / "out")
        assert "No space left on device" in said
        assert "--resume" in said
        assert not list(tmp_path.glob(".out*"))

    def test_a_full_disk_while_the_artifact_is_written(
        self, tiny: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("diffusers.DiffusionPipeline.save_pretrained", self.refuse(errno.ENOSPC))
        said = fails("quantize", tiny, *QUICK, "--out", tmp_path / "out")
        assert "No space left on device" in said
        assert not list(tmp_path.iterdir())

    def test_no_permission(
        self, tiny: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stepquant.job.files.Path.mkdir", self.refuse(errno.EACCES))
        assert "Permission denied" in fails("quantize", tiny, *QUICK, "--out", tmp_path / "out")

    def test_a_file_in_the_way(self, tiny: Path, tmp_path: Path, fails: Fails) -> None:
        (tmp_path / "file").write_text("")
        assert "Not a directory" in fails("quantize", tiny, *QUICK, "--out", tmp_path / "file" / "out")

    def test_an_image_that_cannot_be_written(self, tiny: Path, tmp_path: Path, fails: Fails) -> None:
        (tmp_path / "file").write_text("")
        where = tmp_path / "file" / "grid.png"
        assert "file" in fails("generate", tiny, "--images", 1, "--steps", 1, "--out", where)

    def test_an_image_format_nobody_knows(self, tiny: Path, tmp_path: Path, fails: Fails) -> None:
        assert ".png" in fails("generate", tiny, "--out", tmp_path / "grid.xyz")


class TestOurs:
    def test_a_defect_is_ours_and_says_how_to_report_it(
        self, tiny: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stepquant.job.results.inspect_artifact", lambda *_: 1 / 0)
        said = fails("inspect", tiny, code=1)
        assert "ZeroDivisionError" in said
        assert "--debug" in said

    def test_debug_shows_where(
        self, tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stepquant.job.results.inspect_artifact", lambda *_: 1 / 0)
        assert main(["--debug", "inspect", str(tiny)]) == 1
        assert main(["inspect", str(tiny), "--debug"]) == 1
        assert capfd.readouterr().err.count("Traceback") == 2
