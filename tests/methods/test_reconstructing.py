"""The methods that reconstruct blocks: brecq, qdiffusion, eda_dm and gac, end to end on a small model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.core.affine import fake_quantize, scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import lp_search, minmax
from stepquant.errors import CalibrationError, MethodError
from stepquant.job.recipe import Recipe
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent
from stepquant.quant.schemes import scheme
from tests.conftest import make_one_level

FEW: dict[str, dict[str, Any]] = {
    "brecq": {"samples": 24, "trajectories": 6, "iterations": 12, "step_iterations": 4},
    "qdiffusion": {"trajectories": 6, "at_steps": 4, "iterations": 12, "step_iterations": 4},
    "eda_dm": {"samples": 24, "trajectories": 6, "chunk": 3, "iterations": 12},
    "gac": {"trajectories": 4, "at_steps": 5, "iterations": 12, "time_iterations": 12, "visits": 1}
    | {"meta_batch": 8, "intervals": 2, "range_trajectories": 2},
}


@pytest.fixture
def unet() -> UNet2DModel:
    return make_one_level()


pytestmark = pytest.mark.usefixtures("coarse")


def run(source: Source, name: str, plan: str = "w4a8", **settings: Any) -> Artifact:
    return methods.build(name, FEW[name] | settings)(Denoiser.of(source.pipeline), scheme(plan), source)


@pytest.mark.parametrize("name", FEW)
def test_a_model_comes_back_float_and_its_weights_are_integers(source: Source, name: str) -> None:
    model = source.pipeline.unet
    before = {key: value.clone() for key, value in model.state_dict().items()}
    artifact = run(source, name)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert {f"{path}.weight" for path in artifact.layers} <= set(artifact.tensors)
    assert bool(artifact.splits) == (name in ("qdiffusion", "eda_dm"))
    assert not list(source.cache.glob("streams-*")), "streams leave nothing behind"


@pytest.mark.parametrize("name", ["brecq", "gac"])
def test_roundings_differ_from_nearest_but_scales_do_not(source: Source, name: str) -> None:
    learnt, nearest = run(source, name), run(source, name, iterations=0)
    weights = [path for path in learnt.layers if learnt.layers[path].weight.bits == 4]
    differ = [not torch.equal(learnt.tensors[f"{p}.weight"], nearest.tensors[f"{p}.weight"]) for p in weights]
    assert sum(differ) > len(differ) / 2
    for path in weights:
        assert torch.equal(learnt.tensors[f"{path}.weight_scale"], nearest.tensors[f"{path}.weight_scale"])


def test_presets_fill_what_is_not_given() -> None:
    fast, paper = methods.build("brecq"), methods.build("brecq", {"preset": "paper", "samples": 99})
    assert fast.iterations < paper.iterations == 20000
    assert paper.samples == 99
    with pytest.raises(MethodError, match="preset"):
        methods.build("brecq", {"preset": "slow"})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gac", "groups", 1),
        ("gac", "validation", 1.0),
        ("gac", "temperature", 0.0),
        ("eda_dm", "keep", 0.0),
        ("eda_dm", "times", "normal"),
        ("brecq", "samples", 1),
        ("brecq", "last_rate", 1.5),
        ("qdiffusion", "batch", 0),
        ("qdiffusion", "p", 0.0),
        ("gptq", "damping", -0.1),
        ("gptq", "block", 0),
        ("minmax", "percent", 50.0),
    ],
)
def test_fields_out_of_range_are_refused(name: str, field: str, value: float) -> None:
    with pytest.raises(MethodError, match=f"field '{field}'"):
        methods.build(name, {field: value})


def test_splitting_a_bimodal_input_errs_less() -> None:
    """Two halves of different scale: quantizers of their own leave a smaller error than one for both."""
    generator, grid = torch.Generator().manual_seed(0), Grid.parse("uint8/tensor")
    hidden, skip = torch.randn(400, generator=generator), 20 * torch.randn(400, generator=generator)

    def error(values: torch.Tensor, search: Any) -> float:
        scale, zero_point = scale_and_zero(*search(values[None], grid), grid)
        return float((values - fake_quantize(values, scale, zero_point, grid)).square().sum())

    for search in (minmax, lp_search):
        joint = error(torch.cat([hidden, skip]), search)
        assert error(hidden, search) + error(skip, search) < joint


def test_splits_give_each_half_its_own_ranges(source: Source) -> None:
    artifact = run(source, "qdiffusion", iterations=0, step_iterations=0)
    path = next(iter(artifact.splits))
    scales = [float(artifact.tensors[f"{path}.{half}.input_scale"]) for half in (0, 1)]
    assert scales[0] != scales[1]
    assert not run(source, "qdiffusion", iterations=0, step_iterations=0, split=False).splits


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, words: str) -> None:
        self.heard.append(words)


@pytest.mark.parametrize("split", [True, False])
def test_a_model_without_skip_concatenations_is_quantized_whole_and_that_is_said(
    source: Source, monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    monkeypatch.setattr(Denoiser, "concats", lambda _: {})
    ears = Listening()
    asked = {} if split else {"split": False}  # what is the default, or what is given
    artifact = run(replace(source, progress=ears), "qdiffusion", iterations=0, step_iterations=0, **asked)
    assert not artifact.splits
    assert any("nothing to split" in words for words in ears.heard) == split


@pytest.mark.parametrize(
    ("records", "steps", "said"),
    [(16, 10, ["few records"]), (64, 2, ["few steps"]), (16, 2, ["few records", "few steps"]), (65, 5, [])],
)
def test_little_to_learn_from_is_said(source: Source, records: int, steps: int, said: list[str]) -> None:
    ears = Listening()
    source = replace(source, sampling=Sampling(steps), progress=ears)
    settings = {"samples": records, "trajectories": 16, "iterations": 0, "step_iterations": 0}
    run(source, "brecq", by_step="never", **settings)
    assert [words.split(" to learn")[0] for words in ears.heard if "to learn" in words] == said


@pytest.mark.parametrize("name", ["qdiffusion", "gptq"])
def test_a_split_that_was_asked_for_and_cannot_be_is_an_error(
    source: Source, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Denoiser, "concats", lambda _: {})
    method = methods.build(name, {"split": True})
    with pytest.raises(MethodError, match="no skip concatenations"):
        method(Denoiser.of(source.pipeline), scheme("w4a8"), source)


def test_published_rates_depend_on_the_bits_of_the_weights() -> None:
    rates = {}
    for name in ("w8a8", "w4a8"):
        recipe = Recipe.of(method="eda_dm", scheme=name, settings={"preset": "paper"})
        method = recipe.build_method()
        rates[name] = (method.rounding_rate, method.step_rate)  # type: ignore[attr-defined]
    assert rates == {"w8a8": (0.05, 1e-3), "w4a8": (0.5, 5e-4)}
    given = Recipe.of(method="eda_dm", settings={"preset": "paper", "step_rate": 2e-3}).build_method()
    assert given.step_rate == 2e-3  # type: ignore[attr-defined]


def test_other_settings_start_over_and_the_same_go_on(source: Source) -> None:
    def journals() -> set[str]:
        return {folder.name for folder in (source.cache / "journal").iterdir()}

    first, one = run(source, "brecq", iterations=4), journals()
    again = run(source, "brecq", iterations=4)
    assert journals() == one
    assert all(torch.equal(value, again.tensors[name]) for name, value in first.tensors.items())
    run(source, "brecq", iterations=5)
    assert len(journals()) == 2


def test_uniform_steps_are_another_result_than_tdac(source: Source) -> None:
    picks = [
        methods.build("eda_dm", FEW["eda_dm"] | {"times": times}).draw_steps(source)
        for times in ("tdac", "uniform")
    ]
    assert len(picks[0]) == len(picks[1]) == 24
    assert sorted(picks[0].tolist()) != sorted(picks[1].tolist())


@pytest.mark.parametrize(("radius", "says"), [(1e9, True), (0.0, True), (None, False)])
def test_density_that_says_nothing_is_said(source: Source, radius: float | None, says: bool) -> None:
    ears = Listening()
    method: Any = methods.build("eda_dm", FEW["eda_dm"] | {"radius": radius})
    method.draw_steps(replace(source, progress=ears))
    assert any("density says nothing" in words for words in ears.heard) == says


def test_more_groups_than_recorded_steps_are_one_clear_error(source: Source) -> None:
    with pytest.raises(CalibrationError, match="5 groups of steps cannot be compared"):
        run(source, "gac", at_steps=4)
