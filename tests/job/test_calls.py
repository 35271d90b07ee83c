"""Calls that are written out: read from files, checked, described, and asked of pipelines of several tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiTPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file

from stepquant import hub
from stepquant.calib.pick import Pick, every
from stepquant.calib.record import Source
from stepquant.errors import CalibrationError, ModelError, StepquantError
from stepquant.job import Recipe, quantize
from stepquant.job.calls import read_calls, written_calls
from stepquant.job.inplace import run as quantize_pipeline
from stepquant.job.pipelines import prompts_of, sampling_of
from stepquant.job.recipe import IN_FULL
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import Sampling
from tests.models.pipelines import CALLS, TASKS, Filming, made_for, picture


def lines(folder: Path, *calls: Any) -> Path:
    file = folder / "calls.jsonl"
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in calls))
    return file


def test_files_that_calls_name_are_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture().save(tmp_path / "in" / "hat.png")
    picture().save(tmp_path / "moving.gif", save_all=True, append_images=[picture(5), picture(60)])
    save_file({"prompt_embeds": torch.ones(1, 7, 4), "other": torch.ones(1)}, tmp_path / "t.safetensors")
    file = lines(
        tmp_path,
        {"prompt": "draw hat.png", "image": "in/hat.png", "guidance_scale": 1.5},
        "",
        {"prompt_embeds": "t.safetensors", "video": "moving.gif", "image": ["in/hat.png", "in/hat.png"]},
    )
    first, second = read_calls(file)
    assert first.arguments["prompt"] == "draw hat.png"
    assert first.arguments["guidance_scale"] == 1.5
    assert np.array_equal(np.asarray(first.arguments["image"]), np.asarray(picture()))
    assert second.arguments["prompt_embeds"].shape == (1, 7, 4)
    assert len(second.arguments["video"]) == 3
    assert len(second.arguments["image"]) == 2
    assert (first.origin, second.origin) == ("calls.jsonl, line 1", "calls.jsonl, line 3")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "a table of arguments"),
        ({"image": "none.png"}, "argument 'image'"),
        ({"control_image": "calls.jsonl"}, "argument 'control_image'"),
        ({"prompt_embeds": "calls.safetensors"}, "argument 'prompt_embeds'"),
        ({"prompt_embeds": "two.safetensors"}, "none called 'prompt_embeds'"),
        ({"prompt_embeds": "nan.safetensors"}, "not finite"),
        ({"prompt": ["a", "b"]}, "one prompt"),
        ({"num_inference_steps": 0}, "positive number of steps"),
    ],
)
def test_a_call_that_cannot_be_read_names_its_line(tmp_path: Path, line: Any, said: str) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    save_file({"a": torch.full((1,), float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(StepquantError) as raised:
        read_calls(lines(tmp_path, {"prompt": "good"}, line))
    assert said in str(raised.value)
    assert "calls.jsonl, line 2" in str(raised.value)


def test_no_calls_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(StepquantError, match="empty"):
        read_calls(lines(tmp_path, ""))
    with pytest.raises(StepquantError, match="cannot read the calls"):
        read_calls(tmp_path / "none.jsonl")
    with pytest.raises(StepquantError, match="cannot hold"):
        written_calls([{"prompt": "a", "generator": torch.Generator()}])


def test_a_description_brings_back_the_sizes() -> None:
    arguments = {
        "prompt": "a",
        "image": picture(),
        "prompt_embeds": torch.zeros(2, 3),
        "mask": [np.ones((2, 2))],
    }
    call = Call.of(arguments)
    again = Call.from_json(json.loads(json.dumps(call.described)))
    assert again.stands_in
    assert again.described == call.described
    assert again.arguments["image"].size == (16, 16)
    assert again.arguments["prompt_embeds"].shape == (2, 3)
    assert again.arguments["mask"][0].shape == (2, 2)
    assert call != Call.of(arguments | {"image": picture(91)})
    assert not Call.from_json({"prompt": "a", "height": 8}).stands_in


@pytest.mark.parametrize("task", TASKS)
def test_pipelines_of_every_task_are_quantized_by_their_calls(
    task: str, text_pipeline: StableDiffusionPipeline
) -> None:
    pipe, call = made_for(task, text_pipeline), CALLS[task]
    generator = torch.Generator().manual_seed(3)
    expected = pipe(**call, output_type="pt", generator=[generator]).images
    recipe = Recipe.of(calls=written_calls([call]), method="minmax", settings={"samples": 4})
    sampling = Sampling(recipe.steps, prompts=recipe.asked)
    assert torch.equal(run(pipe, [3], sampling), expected), "as its user would call it"
    artifact = quantize_pipeline(pipe, recipe)
    hub.attach(Denoiser.of(pipe).model, artifact)
    made = run(pipe, [3], sampling)
    error = (made - expected).square().mean().sqrt()
    assert 0 < error < 0.1
    config = hub.config_of(pipe.unet)
    assert config is not None
    (again,) = prompts_of(config)
    shapes = first_arguments(pipe, 3, (again,))
    assert len(shapes["sample"]) == (3 if task == "few steps" else 6)


def test_tensors_meet_a_network_in_its_type() -> None:
    halves = torch.rand(2, 3).bfloat16()
    call = Call.of({"prompt_embeds": halves, "ids": torch.arange(3), "guidance_scale": 2.0})
    here = torch.device("cpu")
    there = call.there(here, torch.float32)
    assert torch.equal(there["prompt_embeds"], halves.float())
    assert there["prompt_embeds"].dtype == torch.float32
    assert there["ids"].dtype == torch.int64
    assert there["guidance_scale"] == 2.0
    assert call.there(here, torch.bfloat16)["prompt_embeds"].dtype == torch.bfloat16
    exact = Call.of({"latents": torch.rand(1, 4)}).there(here, torch.bfloat16)
    assert exact["latents"].dtype == torch.float32, "pipelines round what they must"


def recorded(pipe: Any, folder: Path, *calls: dict[str, Any], steps: int = 4) -> Source:
    return Source(pipe, Sampling(steps, prompts=written_calls(calls)), batch=2, cache=folder)


def test_records_of_a_control_network_replay(text_pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipe = made_for("control", text_pipeline)
    outputs: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda *parts: outputs.append(parts[-1][0]))
    source = recorded(pipe, tmp_path, CALLS["control"])
    data = source.record([Pick(0, 0)])
    handle.remove()
    records = data.take(range(len(data)))
    assert len(records.arguments["down_block_additional_residuals"]) == 4
    with torch.no_grad():
        again = Denoiser.of(pipe).predict(records.arguments)
    torch.testing.assert_close(again[records.branch.argsort()], outputs[-1], atol=1e-5, rtol=1e-4)


def test_image_to_image_has_the_steps_that_its_strength_leaves(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipe, call = made_for("image to image", text_pipeline), CALLS["image to image"]
    source = recorded(pipe, tmp_path, call, steps=8)
    assert source.steps == 4
    assert len(source.times()) == 4
    with pytest.raises(CalibrationError, match="beyond the sampler"):
        source.record([Pick(0, 4)])
    shorter = recorded(pipe, tmp_path, call, call | {"strength": 0.3}, steps=8)
    with pytest.raises(CalibrationError, match="call 2") as raised:
        shorter.record(every(2, (0, 3)))
    assert "same strength" in str(raised.value)


def test_calls_of_other_sizes_are_refused(text_pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    calls = {"prompt": "a", "height": 16, "width": 16}, {"prompt": "b", "height": 32, "width": 16}
    source = recorded(text_pipeline, tmp_path, *calls)
    with pytest.raises(CalibrationError, match="call 2") as raised:
        source.record(every(2, (0,)))
    assert "'sample'" in str(raised.value)
    with pytest.raises(CalibrationError, match="'sample'"):
        replace(source, batch=1).record(every(2, (0,)))
    with pytest.raises(ModelError, match="different sizes"):
        run(text_pipeline, [0, 1], source.sampling)


def test_other_calls_and_other_parts_are_other_recordings(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipe, call = made_for("control", text_pipeline), CALLS["control"]
    keys = {
        recorded(pipe, tmp_path, one).key([Pick(0, 0)])
        for one in (call, call | {"prompt": "b"}, call | {"image": picture(91)}, call | {"guidance_scale": 2})
    }
    with torch.no_grad():
        pipe.controlnet.conv_in.weight[0] += 1
    keys.add(recorded(pipe, tmp_path, call).key([Pick(0, 0)]))
    assert len(keys) == 5
    assert recorded(pipe, tmp_path, dict(call)).key([Pick(0, 0)]) in keys
    names = {
        Recipe.of(calls=written_calls([one])).model_dump_json() for one in (call, call | {"prompt": "b"})
    }
    assert len(names) == 2
    assert Recipe.model_validate_json(names.pop()).calls[0].stands_in


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"prompt": "a", "mask_imag": 1}, "did you mean 'mask_image'"),
        ({"prompt": "a", "output_type": "pil"}, "'output_type' cannot stand in a call"),
        ({"prompt": "a", "height": 17, "image": picture(), "mask_image": picture()}, "ValueError"),
        ({"num_images_per_prompt": 2} | CALLS["inpainting"], "2"),
    ],
)
def test_a_refused_call_says_which_and_why(
    text_pipeline: StableDiffusionPipeline, call: dict[str, Any], said: str
) -> None:
    pipe = made_for("inpainting", text_pipeline)
    asked = written_calls([CALLS["inpainting"], call])[1:]
    with pytest.raises(ModelError) as raised:
        run(pipe, [0], Sampling(2, prompts=asked))
    assert said in str(raised.value)
    assert "call 2" in str(raised.value)


def test_a_call_makes_one_result(class_pipeline: DiTPipeline) -> None:
    one, two = written_calls([{"class_labels": [1]}, {"class_labels": [0, 1]}])
    assert len(run(class_pipeline, [0], Sampling(2, prompts=(one,)))) == 1
    with pytest.raises(ModelError, match="call 2 makes several results"):
        run(class_pipeline, [0], Sampling(2, prompts=(two,)))


def test_what_needs_more_than_a_prompt_points_to_calls(text_pipeline: StableDiffusionPipeline) -> None:
    pipe = made_for("inpainting", text_pipeline)
    with pytest.raises(ModelError, match="--calls") as raised:
        quantize(pipe, prompts=["a hat"], method="minmax", samples=2, steps=2)
    assert "StableDiffusionInpaintPipeline cannot be asked by a prompt alone" in str(raised.value)


def test_calls_decide_the_steps() -> None:
    four, five = written_calls([{"num_inference_steps": 4}, {"num_inference_steps": 5}])
    assert Recipe.of(calls=(four,)).steps == 4
    assert Recipe.of(calls=written_calls([{"prompt": "a"}])).steps == 100
    with pytest.raises(StepquantError, match="same num_inference_steps"):
        Recipe.of(calls=(four, five))
    with pytest.raises(StepquantError, match="--steps 7"):
        Recipe.of(calls=(four,), steps=7)
    with pytest.raises(StepquantError, match="prompts or calls"):
        Recipe.of(calls=(four,), prompts=("a",))


def test_an_artifact_asks_for_pictures_that_it_does_not_hold(text_pipeline: StableDiffusionPipeline) -> None:
    quantize(text_pipeline, calls=[{"prompt": "a"}], method="minmax", samples=2, steps=2)
    assert sampling_of(text_pipeline).prompts == written_calls([{"prompt": "a"}])
    (stands_in,) = (Call.from_json(one.described) for one in written_calls([CALLS["inpainting"]]))
    with pytest.raises(StepquantError, match="--calls FILE"):
        sampling_of(text_pipeline, prompts=(stands_in,))
    with pytest.raises(StepquantError, match="only the sizes"):
        quantize(made_for("inpainting", text_pipeline), calls=[stands_in], method="minmax", samples=2)


def test_a_call_may_make_a_video(text_pipeline: StableDiffusionPipeline) -> None:
    pipe = Filming(**text_pipeline.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a", "num_frames": 2, "num_inference_steps": 2}
    made = run(pipe, [0, 1], Sampling(2, prompts=written_calls([call])))
    assert made.shape == (2, 2, 3, 16, 16)


def test_a_call_reaches_another_process_with_all_that_it_holds() -> None:
    arguments = {
        "prompt": "a",
        "image": picture(),
        "mask": [np.ones((2, 2))],
        "prompt_embeds": torch.rand(2, 3),
    }
    recipe = Recipe.of(calls=written_calls([arguments]))
    (again,) = Recipe.model_validate_json(recipe.model_dump_json(context=IN_FULL)).calls
    assert again == recipe.calls[0]
    assert not again.stands_in
    assert torch.equal(again.arguments["prompt_embeds"], arguments["prompt_embeds"])
    assert again.arguments["image"].tobytes() == picture().tobytes()
    (shapes,) = Recipe.model_validate_json(recipe.model_dump_json()).calls
    assert shapes.stands_in
