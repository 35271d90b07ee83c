"""Modular pipelines: asked by the inputs of their blocks, silent, and called as a user calls them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.wan import encoders

import stepquant
from stepquant import hub
from stepquant.errors import ModelError
from stepquant.job.pipelines import load
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser, denoisers
from stepquant.models.generate import run
from stepquant.models.hooks import first_arguments
from stepquant.models.pipelines.calling import guidance_of
from stepquant.models.pipelines.modular import LOG, load_parts
from stepquant.models.sampling import Sampling
from tests.models import media
from tests.models.modular import flow, save_modular

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_modular(tmp_path_factory.mktemp("modular"))


def test_pictures_are_those_of_the_call_that_a_user_writes(folder: Path) -> None:
    pipe = load(folder)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    wanted = pipe(
        prompt=["a a", "b"], num_inference_steps=STEPS, generator=seeds, output_type="pt", output="images"
    )
    made = run(pipe, [0, 1], Sampling(STEPS, prompts=("a a", "b")))
    assert torch.equal(made, wanted)
    assert not torch.equal(made[0], made[1])


def test_a_written_call_draws_the_same(folder: Path) -> None:
    pipe = load(folder)
    words = run(pipe, [7], Sampling(STEPS, prompts=("b",)))
    written = run(pipe, [7], Sampling(STEPS, prompts=(Call.of({"prompt": "b"}, "call 1"),)))
    assert torch.equal(words, written)


def test_unknown_arguments_are_refused_where_diffusers_would_only_warn(folder: Path) -> None:
    pipe = load(folder)
    with pytest.raises(ModelError, match="(?s)has no argument 'promt'.*did you mean 'prompt'"):
        run(pipe, [0], Sampling(STEPS, prompts=(Call.of({"promt": "b"}, "call 1"),)))


def test_a_part_that_is_not_there_is_named_where_it_is_missed(folder: Path) -> None:
    pipe = load(folder)
    pipe.text_encoder_2 = None
    with pytest.raises(ModelError, match="without: text_encoder_2"):
        run(pipe, [0], Sampling(STEPS, prompts=("a",)))


def test_a_recording_that_ends_early_writes_nothing_down(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = load(folder)
    capfd.readouterr()
    LOG.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.ERROR):
            arguments = first_arguments(pipe, 2, ("a", "b"))
    finally:
        LOG.removeHandler(caplog.handler)
    assert len(arguments[Denoiser.of(pipe).family.x]) == 2
    assert not caplog.records
    assert capfd.readouterr().err == "", "neither an error nor a bar"
    assert not LOG.disabled


def test_a_class_that_only_modular_pipelines_have_runs_in_integers_and_comes_back(tmp_path: Path) -> None:
    """FLUX.3, asked by what its text encoder would have made."""
    pipe, call = flow()
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt", "output": "images", **call}

    def picture(one: Any) -> torch.Tensor:
        made: torch.Tensor = one(generator=torch.Generator().manual_seed(0), **asked)
        return made

    exact = picture(pipe)
    stepquant.quantize(pipe, method="minmax", scheme="w8a8", samples=8, steps=STEPS, calls=[call])
    found = picture(pipe)
    assert 0 < float((found - exact).abs().mean()) < 0.02 * float(exact.std())
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = diffusers.Flux3Transformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(picture(pipe), found)


def test_films_of_two_denoisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "ftfy", SimpleNamespace(fix_text=str), raising=False)  # not installed
    media.film_pipeline().save_pretrained(tmp_path)
    pipe = load_parts(diffusers.Wan22ModularPipeline(pretrained_model_name_or_path=str(tmp_path)), {})
    call = Call.of({"prompt": "a hat", "num_inference_steps": 4, **media.FILM}, "call 1")
    exact = run(pipe, [0], Sampling(4, prompts=(call,)))
    assert exact.shape == (1, media.FILM["num_frames"], 3, 16, 16)
    stepquant.quantize(pipe, method="minmax", scheme="w8a8", samples=4, calls=[call])
    assert [hub.config_of(one) is None for one in denoisers(pipe).values()] == [False, False]
    found = run(pipe, [0], Sampling(4, prompts=(call,)))
    assert 0 < float((found - exact).abs().mean()) < 0.02 * float(exact.std())


def test_guidance_is_that_of_the_guider(folder: Path) -> None:
    pipe = load(folder)
    c, u = torch.randn(2, 5)
    for original in (False, True):
        pipe.guider = diffusers.ClassifierFreeGuidance(4.0, use_original_formulation=original)
        pipe.guider.set_state(step=0, num_inference_steps=1, timestep=torch.tensor(0))
        scale = guidance_of(pipe, "a")
        assert scale is not None
        torch.testing.assert_close(u + scale * (c - u), pipe.guider.forward(c, u).pred)
    pipe.guider = diffusers.AdaptiveProjectedGuidance(4.0)
    assert guidance_of(pipe, "a") is None


def test_parts_saved_in_bfloat16_are_computed_in_float32(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in ("text_encoder", "unet"):
        getattr(load(folder), name).to(torch.bfloat16).save_pretrained(copy / name)
    index = copy / "modular_model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace(str(folder), str(copy)))
    pipe = load(copy)
    assert {part.dtype for part in (pipe.unet, pipe.text_encoder, pipe.vae)} == {torch.float32}
    assert run(pipe, [0], Sampling(STEPS, prompts=("a",))).isfinite().all()
