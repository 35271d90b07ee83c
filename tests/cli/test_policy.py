"""Steps in float from the command line: quantize, explain, inspect, resume, and what cannot be asked for together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

import stepquant
from stepquant.cli import main
from stepquant.core.policy import POLICY
from stepquant.errors import StepquantError
from stepquant.job.recipe import Recipe
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import sample
from stepquant.models.sampling import Sampling
from stepquant.runtime.policy import PolicyForward
from tests.cli.conftest import QUICK

ASKED = ("--policy", "last=1,first=1")


def test_the_last_step_is_as_asked_from_the_folder_on(
    tiny: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, told = tmp_path / "out", tmp_path / "told.json"
    words = ["quantize", str(tiny), *QUICK, *ASKED, "--out", str(out)]
    assert main([*words, "--explain", "--quiet", "--json", str(told)]) == 0
    said = capfd.readouterr().out
    assert "policy first=1,last=1: at the first step and the last step activations stay in float" in said
    assert json.loads(told.read_text())["policy"] == "first=1,last=1"
    config = json.loads((out / "unet" / "config.json").read_text())["quantization_config"]
    assert config["recipe"]["policy"] == "first=1,last=1"
    assert config["runtime"][POLICY]["last_steps"] == {"count": 1, "mode": "a16"}
    assert config["runtime"][POLICY]["scope"] == ["unet"]
    assert "first=1,last=1" in (out / "README.md").read_text()
    plain = json.loads((artifact / "unet" / "config.json").read_text())["quantization_config"]
    assert "policy" not in plain["recipe"]
    assert "runtime" not in plain
    mine, others = (
        {n: d for n, d in one["digests"].items() if n.endswith(".weight")} for one in (config, plain)
    )
    assert mine == others  # weights as without a policy; ranges are those of the steps in integers

    assert main(["inspect", str(out), "--json", str(told)]) == 0
    shown = json.loads(told.read_text())
    assert "activations in float at the first step and the last step" in capfd.readouterr().out
    assert shown["shares"]["of_planned"] > 0.9
    assert main([*words, "--resume", "--quiet"]) == 0
    assert main([*words[:-4], "--out", str(out), "--resume", "--quiet"]) == 2
    assert "policy" in capfd.readouterr().err

    follow(artifact, out)


def follow(artifact: Path, out: Path) -> None:
    """Which of its calls a generation makes as a float network; `from_pretrained` alone has told it."""
    pipe = DDIMPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    calls: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]] = []
    pipe.unet.register_forward_hook(lambda _, given, made: calls.append((given, made[0])))
    list(sample(pipe, [3], Sampling(4)))
    integers, floats = stepquant.load(out).unet, stepquant.load(artifact).unet
    del integers.forward  # the policy's own
    floats.dequantize()
    assert len(calls) == 4
    with torch.no_grad():
        for step, (given, made) in enumerate(calls):
            if step in (0, 3):
                torch.testing.assert_close(made, floats(*given).sample, rtol=0, atol=1e-5)
            else:
                assert torch.equal(made, integers(*given).sample)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policy", "3"), "which steps"),
        (("--policy", "first=2,last=2"), "no step in integers"),
        (("--policy", "last=1", "--scheme", "w8a16"), "a policy would change nothing"),
        (("--policy", "last=1", "--method", "minmax+tac"), "ask for the method in front of '+' alone"),
        (("--policy", "last=1", "--method", "qncd"), "ask for --set inter=false"),
    ],
)
def test_what_a_policy_cannot_be(
    words: tuple[str, ...], said: str, tiny: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    base = () if "--method" in words else ("--method", "minmax")
    assert said in fails(
        "quantize", tiny, *base, "--steps", "4", *words, "--out", tmp_path / "out", "--quiet"
    )
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_policy_says_what_it_always_said(tiny: Path) -> None:
    pipeline = stepquant.load(tiny)
    plain, asked = Recipe.of(model=str(tiny)), Recipe.of(model=str(tiny), policy="last=1")
    assert asked.provenance(pipeline) == plain.provenance(pipeline) | {"policy": "last=1"}


def test_a_policy_in_memory_is_for_one_denoiser(tiny: Path) -> None:
    pipeline = stepquant.load(tiny)
    quick = {"samples": 8, "batch": 4}
    stepquant.quantize(pipeline, method="minmax", steps=4, settings=quick, policy="last=1")
    assert isinstance(pipeline.unet.__dict__["forward"], PolicyForward)
    two = stepquant.load(tiny)
    two.other = Denoiser.of(stepquant.load(tiny)).model
    with pytest.raises(StepquantError, match="several"):
        stepquant.quantize(two, method="minmax", steps=4, settings=quick, policy="last=1")
