"""Pipelines are asked in the way of their kind; what none of them can show is one error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline, StableDiffusionPipeline

from stepquant.errors import ModelError, UnknownNameError
from stepquant.models.generate import asked_of, run, words_of
from stepquant.models.pipelines import classes, text, unconditional
from stepquant.models.pipelines.registry import declared, kind_of
from stepquant.models.sampling import Sampling, generators


def test_every_declared_pipeline_has_one_kind(
    pipeline: DDIMPipeline, class_pipeline: DiTPipeline, text_pipeline: Any
) -> None:
    assert {kind_of(one) for one in (pipeline, class_pipeline, text_pipeline)} == set(declared().values())
    assert kind_of(pipeline) is unconditional.KIND

    class Mine(DiTPipeline):
        pass

    assert kind_of(object.__new__(Mine)) is classes.KIND
    assert kind_of(object()) is text.KIND


def test_classes_are_asked_for_in_turn(class_pipeline: DiTPipeline) -> None:
    assert words_of(class_pipeline, Sampling(2)) == ("cat", "frog", "toad")
    assert asked_of(class_pipeline, [0, 1, 5], Sampling(2)) == ["cat", "frog", "toad"]
    expected = class_pipeline(
        [0, 1, 1], generator=generators([0, 1, 2]), num_inference_steps=3, output_type="np"
    ).images
    got = run(class_pipeline, [0, 1, 2], Sampling(3))
    assert torch.allclose(got.permute(0, 2, 3, 1), torch.from_numpy(expected), atol=1e-6)


def test_a_class_has_a_name_or_a_number(class_pipeline: DiTPipeline) -> None:
    by_name, by_number = (run(class_pipeline, [3], Sampling(2, prompts=(word,))) for word in ("toad", "1"))
    assert torch.equal(by_name, by_number)
    with pytest.raises(UnknownNameError, match="frog"):
        run(class_pipeline, [0], Sampling(2, prompts=("forg",)))
    with pytest.raises(ModelError, match="0 to 999"):
        run(class_pipeline, [0], Sampling(2, prompts=("1000",)))


def test_the_scheduler_of_the_user_stays(class_pipeline: DiTPipeline) -> None:
    own = class_pipeline.scheduler
    run(class_pipeline, [0], Sampling(2, "euler"))
    assert class_pipeline.scheduler is own


def test_what_cannot_be_asked_is_said(pipeline: DDIMPipeline, text_pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match="takes no text"):
        run(pipeline, [0], Sampling(2, prompts=("a cat",)))
    with pytest.raises(ModelError, match="needs prompts"):
        run(text_pipeline, [0], Sampling(2))
