"""How many states the denoiser meets is known without denoising, whatever the pipeline's loop is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from stepquant.calib.record import Source
from stepquant.calib.rows import Steps
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser, by_denoiser
from stepquant.models.generate import run
from stepquant.models.hooks import listening
from stepquant.models.sampling import Sampling
from tests.models.media import FILM, SOUND, film_pipeline, sound_pipeline
from tests.models.modular import flow
from tests.models.pipelines import CALLS, TASKS, made_for

OF_ORDER = (PNDMScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, EulerAncestralDiscreteScheduler)
IMAGES = [(task, kind) for task in TASKS for kind in (None, *OF_ORDER) if kind is None or task != "few steps"]


def source_for(pipe: Any, folder: Path, call: dict[str, Any], steps: int) -> Source:
    return Source(pipe, Sampling(steps, prompts=(Call.of(call),)), batch=2, cache=folder)


def met_in_a_whole_run(source: Source) -> int:
    """The states of a trajectory that is really denoised."""
    denoiser, counted = Denoiser.of(source.pipeline), Steps()

    def listener(_: int, arguments: dict[str, Any]) -> None:
        counted.see(arguments[denoiser.family.x], arguments[denoiser.family.t])

    with listening(denoiser, listener):
        run(source.pipeline, [5], source.sampling)
    return counted.step + 1


@pytest.mark.parametrize(("task", "scheduler"), IMAGES)
def test_tasks_and_samplers(
    task: str, scheduler: Any, text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipe, call = made_for(task, text_pipeline), CALLS[task]
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    source = source_for(pipe, tmp_path, call, call["num_inference_steps"])
    assert source.steps == met_in_a_whole_run(source)


@pytest.mark.parametrize("steps", [4, 9])
def test_two_denoisers_share_the_steps(steps: int, tmp_path: Path) -> None:
    found = []
    for one in by_denoiser(film_pipeline()):
        source = source_for(one, tmp_path, {"prompt": "a", **FILM}, steps)
        found.append(source.steps)
        assert found[-1] == met_in_a_whole_run(source)
    assert sum(found) == steps


def test_sounds_and_modular_pipelines(tmp_path: Path) -> None:
    sounding, said = sound_pipeline(), {"prompt": "a", **SOUND}
    flowing, asked = flow()
    for pipe, call in ((sounding, said), (flowing, asked)):
        source = source_for(pipe, tmp_path, call, 3)
        assert source.steps == met_in_a_whole_run(source)


def test_a_denoiser_computes_once_and_is_as_it_was(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Once for two branches in one call, whatever wraps its forward; nobody's random numbers are taken."""
    called: list[Any] = []
    unet, own = text_pipeline.unet, text_pipeline.unet.forward
    unet.forward = wrapped = lambda *args, **kwargs: own(*args, **kwargs)
    handle = unet.conv_in.register_forward_hook(lambda *_: called.append(_))
    before = torch.random.get_rng_state()
    assert source_for(text_pipeline, tmp_path, {"prompt": "a"}, 7).steps == 7
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(called) == 1
    assert unet.forward is wrapped
    del unet.forward
    handle.remove()
    assert source_for(text_pipeline, tmp_path, {"prompt": "a"}, 7).steps == 7
    assert "forward" not in vars(unet)
