"""Steps and branches of what the denoiser receives, whatever the sampler and however guidance calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.utils._pytree import tree_map

from stepquant.calib.form import Parts, put_together
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.calib.rows import Rows, check_alike
from stepquant.errors import CalibrationError
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.family import Family
from stepquant.models.sampling import Sampling, scheduler_of


def options_of(scheduler: Any) -> dict[str, Any]:
    """As Stable Diffusion has it: without steps of another kind at the beginning."""
    return {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}


class Twice(StableDiffusionPipeline):
    """Asks for both branches of guidance in calls of their own, the conditional one first."""

    def __call__(self, prompt: Any, num_inference_steps: int = 3, **_: Any) -> Any:  # type: ignore[override]
        self.scheduler.set_timesteps(num_inference_steps)
        text, none = self.encode_prompt(prompt, "cpu", 1, True)
        x = torch.ones(len(text), 4, 8, 8) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(x, t)
            one, other = (self.unet(scaled, t, one, return_dict=False)[0] for one in (text, none))
            x = self.scheduler.step(other + 2 * (one - other), t, x, return_dict=False)[0]
        return SimpleNamespace(images=x[:, :3])


class Marked(StableDiffusionPipeline):
    """The unconditional branch first, each within a cache context that says which it is."""

    def __call__(self, prompt: Any, num_inference_steps: int = 3, **_: Any) -> Any:  # type: ignore[override]
        self.scheduler.set_timesteps(num_inference_steps)
        text, none = self.encode_prompt(prompt, "cpu", 1, True)
        for t in self.scheduler.timesteps:
            for name, one in (("uncond", none), ("cond", text)):
                with self.unet.cache_context(name):
                    self.unet(torch.full((len(text), 4, 8, 8), t / 1000), t, one)
        return SimpleNamespace(images=torch.zeros(len(text), 3, 8, 8))


def test_arguments_are_put_together_as_they_were() -> None:
    x, text, angles = torch.randn(2, 3), torch.randn(4, 5, 6), torch.randn(7, 8)
    given = {
        "x": [x[0], x[1]],
        "t": torch.tensor(3),
        "text": text,
        "size": [(1, 2), (3, None)],
        "nothing": {},
        "rope": (angles, angles.sin()),
        "flag": True,
    }
    family = Family(("A",), "x", {}, lambda _: [], t="t", shared=("rope",))
    parts = Parts.of(given, family)
    back = put_together({"table": json.loads(json.dumps(parts.form))}, {**parts.rows, **parts.shared})
    assert parts.rows["text"].shape == (2, 2, 5, 6)
    assert [type(value) for value in back.values()] == [type(value) for value in given.values()]
    assert torch.equal(back.pop("t"), torch.tensor([3, 3]))
    assert str(tree_map(str, back)) == str(tree_map(str, {n: given[n] for n in back}))


@pytest.mark.parametrize("scheduler", [None, PNDMScheduler, HeunDiscreteScheduler])
def test_two_calls_of_a_step_are_its_branches(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path, scheduler: Any
) -> None:
    pipe = Twice(**text_pipeline.components, requires_safety_checker=False)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options_of(scheduler))
    source = Source(pipe, Sampling(3, prompts=("a b", "c")), batch=2, cache=tmp_path)
    assert source.steps == {None: 3, PNDMScheduler: 4, HeunDiscreteScheduler: 5}[scheduler]
    records = (data := source.record(every(2, range(source.steps)))).take(range(len(data)))
    assert len(records) == 2 * 2 * source.steps
    assert torch.equal(records.branch.sort().values, torch.tensor([0, 1]).repeat_interleave(2 * source.steps))
    text = records.arguments["encoder_hidden_states"]
    unasked = text[records.branch == 0]
    torch.testing.assert_close(unasked, unasked[:1].expand_as(unasked))
    assert not torch.allclose(text[records.branch == 1], unasked)
    expected = scheduler_of(pipe, None, 3).timesteps.double()
    assert torch.equal(source.times().double(), expected)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler])
def test_samplers_of_second_order_are_recorded_to_their_end(
    pipeline: DDIMPipeline, tmp_path: Path, scheduler: Any
) -> None:
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options_of(scheduler))
    source = Source(pipeline, Sampling(4), cache=tmp_path)
    assert source.steps == {PNDMScheduler: 5, HeunDiscreteScheduler: 7}[scheduler]
    times = source.times()
    assert len(times) == source.steps
    assert len(times.unique()) == 4


class Shifted(StableDiffusionPipeline):
    """Tells its scheduler how far the size of images shifts the times."""

    def __call__(self, prompt: Any, num_inference_steps: int = 3, **_: Any) -> Any:  # type: ignore[override]
        self.scheduler.set_timesteps(num_inference_steps, mu=1.0)
        text, _none = self.encode_prompt(prompt, "cpu", 1, False)
        x = torch.ones(len(text), 4, 8, 8)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t, text).sample, t, x).prev_sample
        return SimpleNamespace(images=torch.zeros(len(text), 3, 8, 8))


def test_times_that_the_size_of_images_shifts_are_those_that_arrive(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipe = Shifted(**text_pipeline.components, requires_safety_checker=False)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    source = Source(pipe, Sampling(3, prompts=("a",)), cache=tmp_path)
    assert source.steps == 3
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(3, mu=1.0)
    assert torch.equal(source.times(), scheduler.timesteps)


def test_a_cache_context_says_which_branch_it_is(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    @contextmanager
    def cache_context(_: Any, name: str) -> Iterator[None]:
        entered.append(name)
        yield

    monkeypatch.setattr(UNet2DConditionModel, "cache_context", cache_context, raising=False)
    pipe = Marked(**text_pipeline.components, requires_safety_checker=False)
    source = Source(pipe, Sampling(3, prompts=("a b", "c")), batch=2, cache=tmp_path)
    records = (data := source.record(every(2, range(3)))).take(range(len(data)))
    unasked = records.arguments["encoder_hidden_states"][records.branch == 0]
    assert len(unasked) == len(records) // 2 == 6
    torch.testing.assert_close(unasked, unasked[:1].expand_as(unasked))
    assert entered[:2] == ["uncond", "cond"]
    assert "cache_context" not in vars(pipe.unet)


def arguments(scale: Any = 0.5) -> dict[str, Any]:
    return {
        "sample": torch.ones(2, 3, 8, 8),
        "timestep": torch.tensor(5),
        "cross_attention_kwargs": {"scale": scale, "mask": torch.ones(3)},
    }


def test_what_has_no_rows_is_kept_once_and_may_not_change(text_pipeline: StableDiffusionPipeline) -> None:
    rows = Rows(Denoiser.of(text_pipeline), [0, 1])
    rows.keep(arguments(), [0], 0, 0, "")
    rows.keep(arguments(), [1], 0, 1, "")
    kept = {"scale": 0.5, "mask": {"shared": "cross_attention_kwargs.mask"}}
    assert rows.form["cross_attention_kwargs"] == {"table": kept}
    assert torch.equal(rows.shared["cross_attention_kwargs.mask"], torch.ones(3))
    assert len(rows.together()["sample"]) == 2
    with pytest.raises(CalibrationError, match=r"'cross_attention_kwargs' of the denoiser changes"):
        rows.keep(arguments(0.6), [0], 1, 0, "")
    with pytest.raises(CalibrationError, match="cannot be recorded"):
        rows.keep(arguments(object()), [0], 1, 0, "")
    with pytest.raises(CalibrationError, match="'b'"):
        check_alike({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, "here")
    with pytest.raises(CalibrationError, match="other rows"):
        rows.keep(arguments() | {"encoder_hidden_states": torch.ones(3, 7, 32)}, [0], 1, 0, "")


def test_shared_arguments_come_back_with_the_records(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    model = text_pipeline.unet
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"cross_attention_kwargs": {"scale": 0.5}}), with_kwargs=True
    )
    source = Source(text_pipeline, Sampling(2, prompts=("a",)), batch=2, cache=tmp_path)
    records = source.record(every(2, range(2))).take(range(3))
    handle.remove()
    assert records.arguments["cross_attention_kwargs"] == {"scale": 0.5}
    assert records.arguments["sample"].shape == (3, 4, 8, 8)
