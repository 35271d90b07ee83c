"""Ranges by step: an option of every method that sets ranges, and what becomes of a model whose steps differ."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DModel,
)

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.fit.uneven import SMALL, uneven
from stepquant.methods.method import RangedMethod
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import lower
from tests.conftest import make_one_level
from tests.contracts.smallest import FEW, made, smallest
from tests.models.tiny import conditional

RANGED = [name for name in methods.names() if issubclass(methods.kind(name), RangedMethod)]
LEARNING = {"brecq": "step_iterations", "qdiffusion": "step_iterations", "eda_dm": "iterations"}


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, words: str) -> None:
        self.heard.append(words)


def run(source: Source, name: str, plan: str = "w8a8", **settings: Any) -> Artifact:
    return made(smallest(name, **settings), scheme(plan), source)


def stepped(artifact: Artifact) -> set[tuple[str, str]]:
    """The activations that have a range for every interval of steps."""
    found = {(path, "input") for path, spec in artifact.layers.items() if spec.input is not None}
    grids = {place: artifact.layers[place[0]].input for place in found}
    for path, spec in artifact.products.items():
        grids |= {(path, port): getattr(spec, port) for port in ("query", "key", "value", "probabilities")}
    return {place for place, grid in grids.items() if grid is not None and grid.granularity == "step"}


@pytest.fixture
def unet() -> UNet2DModel:
    return make_one_level()


@pytest.fixture
def source(pipeline: DDIMPipeline, tmp_path: Path) -> Source:
    """With as many steps as ranges."""
    return Source(pipeline, Sampling(FEW), batch=4, cache=tmp_path)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", RANGED)
def test_ranges_by_step_are_an_option_of_every_method(source: Source, name: str) -> None:
    always = run(source, name, by_step="always")
    places = stepped(always)
    assert len(places) > 10
    assert always.steps is not None
    assert always.steps.groups == FEW
    scales = [always.tensors[f"{path}.{port}_scale"] for path, port in places if port == "input"]
    assert all(len(scale) == FEW for scale in scales)
    assert sum(len(scale.unique()) == FEW for scale in scales) > len(scales) / 2
    lowered = lower(copy.deepcopy(source.pipeline.unet), always, torch.float32)
    assert lowered(torch.zeros(1, 3, 8, 8), source.times()[0]).sample.isfinite().all()


def test_ranges_by_step_are_the_default_where_the_paper_has_them() -> None:
    default = {name: methods.build(name).by_step for name in RANGED}  # type: ignore[attr-defined]
    always = {name for name, choice in default.items() if choice == "always"}
    assert always == {"dgq", "gac", "tfmq", "dilatequant", "quest", "efficientdm"}
    assert set(default.values()) == {"auto", "always"}


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", LEARNING)
def test_each_step_learns_its_own(source: Source, name: str) -> None:
    """Which row a batch reads decides which row it moves."""
    still = run(source, name, by_step="always", **{LEARNING[name]: 0})
    moved = run(source, name, by_step="always", step_rate=0.05, **{LEARNING[name]: 8})
    changed = [
        moved.tensors[f"{path}.input_scale"] / still.tensors[f"{path}.input_scale"]
        for path, port in stepped(moved)
        if port == "input"
    ]
    apart = [ratio for ratio in changed if len(ratio.unique()) == FEW]
    assert len(apart) > len(changed) / 8


def sdxl(folder: Path) -> Source:
    """A tiny SDXL with random weights, whose states grow under Euler, with texts that are there already."""
    torch.manual_seed(0)
    unet = conditional(
        sample_size=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    ).eval()
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )
    pipeline.set_progress_bar_config(disable=True)
    texts = {"prompt_embeds": (1, 7, 32), "pooled_prompt_embeds": (1, 16)}
    given = {name: torch.randn(shape) for name, shape in texts.items()}
    given |= {f"negative_{name}": torch.randn(shape) for name, shape in texts.items()}
    call = Call.of({**given, "num_inference_steps": 12, "height": 8, "width": 8, "guidance_scale": 9.0})
    return Source(pipeline, Sampling(12, prompts=(call,)), batch=4, cache=folder)


def first_error(source: Source, artifact: Artifact) -> float:
    """Relative error of the first prediction."""
    denoiser = Denoiser.of(source.pipeline)
    lowered = Denoiser(lower(copy.deepcopy(denoiser.model), artifact, torch.float32))
    data = source.record(every(2, (0,)))
    arguments = data.take(range(len(data))).arguments
    with torch.no_grad():
        exact, got = (model.predict(arguments) for model in (denoiser, lowered))
    return ((got - exact).norm() / exact.norm()).item()


def test_steps_that_one_range_would_not_serve_are_found_and_get_their_own(tmp_path: Path) -> None:
    ears = Listening()
    source = replace(sdxl(tmp_path), progress=ears)
    many = {"samples": 24, "trajectories": 2}
    one = run(source, "minmax", by_step="never", **many)
    assert not any("by_step" in words for words in ears.heard)
    own = run(source, "minmax", intervals=12, **many)
    said = [words for words in ears.heard if "by_step=never" in words]
    assert len(said) == 1
    assert f"{len(stepped(own))} activations" in said[0]
    assert 0 < len(stepped(own)) < len(own.layers) / 2
    before, after = first_error(source, one), first_error(source, own)
    assert after < before / 2


def test_a_model_whose_steps_are_alike_keeps_one_range(source: Source) -> None:
    data = source.record(every(2, range(FEW)))
    parts = uneven(Denoiser.of(source.pipeline), scheme("w8a8"), data, small=2.0)
    assert len(parts) > 10
    assert min(parts.values()) > SMALL
    assert run(source, "minmax").steps is None
    assert not stepped(run(source, "tfmq", by_step="never"))
