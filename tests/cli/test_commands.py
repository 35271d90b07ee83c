"""Every command does what it says, and leaves its result as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from stepquant import methods
from stepquant.cli import main
from stepquant.job import pipelines
from stepquant.quant.auto import FORMS
from stepquant.quant.schemes import SCHEMES
from tests.cli.conftest import QUICK


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(tmp_path: Path, *words: object) -> Any:
    """The JSON result of a command line that must work."""
    file = tmp_path / "result.json"
    assert main([*map(str, words), "--json", str(file)]) == 0
    return json.loads(file.read_text())


COMMANDS = (
    "demo",
    "quantize",
    "card",
    "generate",
    "evaluate",
    "benchmark",
    "compare",
    "results",
    "diff",
    "inspect",
    "convert",
    "export",
    "report",
    "methods",
    "schemes",
    "models",
    "sensitivity",
    "layers",
    "allocate",
)


def test_help_names_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capfd.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capfd.readouterr()
    assert f"stepquant {command}" in shown.out
    assert not shown.err


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("stepquant ")


def test_an_artifact_with_tables_by_step_is_sampled_as_it_was_made(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "tied"
    words = ("--method", "minmax+d2dpm", "--set", "d2dpm.trajectories=4", "--sampler", "euler", *QUICK[2:])
    run(tmp_path, "quantize", tiny, *words, "--out", out)
    assert run(tmp_path, "generate", out, "--images", 1, "--out", tmp_path / "x.png")["steps"] == 4
    found = run(tmp_path, "evaluate", out, "--against", tiny, "--images", 2, "--no-floor")
    assert found["sampling"]["steps"] == 4


def test_a_text_model_keeps_its_prompts(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "text", tmp_path / "text-w8a8"
    text_pipeline.save_pretrained(source)
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    words = ("--method", "minmax", "--samples", "8", "--steps", "2", "--prompts", tmp_path / "prompts.txt")
    capfd.readouterr()
    run(tmp_path, "quantize", source, *words, "--out", out, "--quiet")
    assert not capfd.readouterr().err
    assert 'pipe("a prompt", num_inference_steps=2)' in (out / "README.md").read_text()
    run(tmp_path, "generate", out, "--images", 1, "--steps", 1, "--out", tmp_path / "x.png")
    run(tmp_path, "evaluate", out, "--against", source, "--images", 2, "--steps", 1, "--no-floor")


def test_methods(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert set(run(tmp_path, "methods")) == set(methods.names())
    listed = run(tmp_path, "methods", "minmax")
    assert set(listed["minmax"]["fields"]) == set(methods.kind("minmax").model_fields)
    assert "momentum" in capfd.readouterr().out


def test_schemes(tmp_path: Path) -> None:
    assert run(tmp_path, "schemes") == SCHEMES | FORMS
    assert run(tmp_path, "schemes", "w4a8")["name"] == "w4a8"


def test_models(tmp_path: Path) -> None:
    listed = run(tmp_path, "models")
    assert "stepquant:characters" in listed
    assert all(model["bytes"] < 30e6 for model in listed.values())


class TestQuantize:
    def test_the_result(self, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        result = run(tmp_path, "quantize", tiny, *QUICK, "--out", tmp_path / "out")
        assert result["out"] == str(tmp_path / "out")
        assert result["found"] is False
        assert result["share"] == result["weights_bytes"] / result["float_bytes"]
        assert result["artifact_recipe"]["settings"]["samples"] == 8
        said = capfd.readouterr()
        assert f"wrote {tmp_path / 'out'}" in said.out
        assert "recording trajectories" in said.err

    def test_quiet_says_the_result_only(
        self, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["quantize", str(tiny), *QUICK, "--out", str(tmp_path / "out"), "--quiet"]) == 0
        said = capfd.readouterr()
        assert len(said.out.splitlines()) == 1
        assert not said.err

    def test_the_card_can_be_left_out_and_made_later(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded: list[str] = []
        opened = pipelines.open_pipeline
        monkeypatch.setattr(pipelines, "open_pipeline", lambda at: loaded.append(at.name) or opened(at))
        whole, bare = tmp_path / "a" / "out", tmp_path / "b" / "out"
        assert run(tmp_path, "quantize", tiny, *QUICK, "--out", whole)["card"] == str(whole / "README.md")
        assert loaded == ["tiny", "out"]  # the float model once
        assert run(tmp_path, "quantize", tiny, *QUICK, "--no-card", "--out", bare)["card"] is None
        assert loaded == ["tiny", "out", "tiny"]
        assert not {"README.md", "samples.png"} & {file.name for file in bare.iterdir()}
        assert run(tmp_path, "card", bare)["card"] == str(bare / "README.md")
        assert contents(bare) == contents(whole)
        for name in ("README.md", "samples.png"):
            (bare / name).unlink()
        assert run(tmp_path, "quantize", tiny, *QUICK, "--resume", "--out", bare)["found"]
        assert contents(bare) == contents(whole)

    @pytest.mark.parametrize(
        ("failure", "code"), [(KeyboardInterrupt, 130), (MemoryError, 2), (RuntimeError, 1)]
    )
    def test_the_artifact_stays_whatever_becomes_of_its_card(
        self,
        failure: type[BaseException],
        code: int,
        tiny: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise failure("of the card")

        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr("stepquant.job.card.write_media", fail)
            assert main(["quantize", str(tiny), *QUICK, "--out", str(out), "--quiet"]) == code
        said = capfd.readouterr()
        assert f"wrote {out}" in said.out
        assert f"stepquant card {out}" in said.err
        assert "--resume" not in said.err
        run(tmp_path, "card", out)
        run(tmp_path, "generate", out, "--images", 1, "--steps", 1, "--out", tmp_path / "x.png")

    def test_resume_keeps_what_is_there(
        self, tiny: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        result = run(tmp_path, "quantize", tiny, *QUICK, "--out", artifact, "--resume")
        assert result["found"] is True
        assert "is there already" in capfd.readouterr().out

    def test_explain_shows_every_site_and_writes_nothing(
        self, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        result = run(tmp_path, "quantize", tiny, "--scheme", "w4a8", "--explain")
        shown = capfd.readouterr().out
        assert all(site["path"] in shown for site in result["sites"])
        assert all(site["grid"] and site["reason"] for site in result["sites"])
        decided = {(site["path"], site["port"]): site["grid"] for site in result["sites"]}
        assert decided["conv_in", "weight"] == "int8/channel"
        assert decided["mid_block.resnets.0.conv1", "weight"] == "int4/channel"
        assert "first and last layer touch pixels directly" in shown
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]

    def test_a_plan_file_keeps_a_layer_float(self, tiny: Path, tmp_path: Path) -> None:
        plan = tmp_path / "plan.json"
        plan.write_text(
            '{"name": "mine", "rules": [{"grid": "float", "path": "conv_out", "reason": "I say so"}]}'
        )
        out = tmp_path / "out"
        run(tmp_path, "quantize", tiny, *QUICK, "--scheme", "w8a8", "--plan", plan, "--out", out)
        layers = json.loads((out / "unet" / "config.json").read_text())["quantization_config"]["layers"]
        assert "conv_in" in layers
        assert "conv_out" not in layers


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "euler", "unipc"])
def test_generate_from_integers_with_every_sampler(artifact: Path, tmp_path: Path, sampler: str) -> None:
    grid = tmp_path / "deep" / "grid.png"
    result = run(
        tmp_path, "generate", artifact, "--images", 4, "--steps", 3, "--sampler", sampler, "--out", grid
    )
    assert result["images"] == 4
    assert min(Image.open(grid).size) > 16


def test_the_same_seed_gives_the_same_grid(artifact: Path, tmp_path: Path) -> None:
    grids = []
    for name, seed in (("a.png", 3), ("b.png", 3), ("c.png", 4)):
        run(
            tmp_path,
            "generate",
            artifact,
            "--images",
            2,
            "--steps",
            2,
            "--seed",
            seed,
            "--out",
            tmp_path / name,
        )
        grids.append((tmp_path / name).read_bytes())
    assert grids[0] == grids[1] != grids[2]


def test_inspect(artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "inspect", artifact, "--layers")
    assert result["quantized"]["scheme"] == "w8a8"
    shown = capfd.readouterr().out
    assert all(row["path"] in shown for row in result["coverage"])
    assert 0.9 < result["shares"]["of_planned"] <= 1
    assert all(row["reason"] for row in result["coverage"] if not row["integer"])


def test_evaluate_benchmark_report(
    tiny: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluated = run(
        tmp_path, "evaluate", artifact, "--against", tiny, "--images", 4, "--steps", 2, "--batch", 2
    )
    assert {number["name"] for number in evaluated["quality"]} >= {"PSNR", "SSIM"}
    timed = run(
        tmp_path, "benchmark", artifact, "--against", tiny, "--batch", 1, "--seconds", 0.1, "--no-compile"
    )
    assert {row["name"] for row in timed["speed"]["rows"]} >= {"fp32 eager", "stepquant"}
    inspected = run(tmp_path, "inspect", artifact)
    assert inspected["coverage"] == timed["coverage"] == evaluated["coverage"]
    shares = inspected["shares"]
    assert capfd.readouterr().out.count(f"{shares['of_all']:.2%} of the multiply-accumulates") == 2
    assert timed["quality"] == evaluated["quality"]  # what was measured before is kept
    run(tmp_path, "report", artifact, "--out", tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text()
    assert f"{100 * shares['of_all']:.2f} %" in page
    assert f"| MACs in integers | – | {100 * shares['of_all']:.2f} %" in (artifact / "README.md").read_text()
    assert "PSNR" in page
    assert "<script src" not in page


def test_a_float_model_is_timed_alone(tiny: Path, tmp_path: Path) -> None:
    rows = run(tmp_path, "benchmark", tiny, "--batch", "1", "--seconds", 0.1, "--no-compile")["speed"]["rows"]
    assert "stepquant" not in {row["name"] for row in rows}
