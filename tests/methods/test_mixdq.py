from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.core.pack import packed_bytes
from stepquant.fit import alone
from stepquant.fit.alone import Structure
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run as draw
from stepquant.models.sampling import Sampling
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import CONTENT
from stepquant.runtime.lower import lower
from tests.conftest import without_ends

pytestmark = pytest.mark.usefixtures("coarse")
FEW = {"samples": 6, "trajectories": 2, "states": 2, "pictures": 2, "picture_steps": 1}
READS_TEXT = ("k_text", "v_text")


@pytest.fixture
def of_words(text_pipeline: StableDiffusionPipeline, source: Source) -> Source:
    return replace(source, pipeline=text_pipeline, sampling=Sampling(2, prompts=("ab", "c d")), batch=2)


@pytest.fixture(scope="module")
def kept() -> dict[str, Artifact]:
    """What was made of the pipeline of all tests here."""
    return {}


def once(kept: dict[str, Artifact], source: Source) -> Artifact:
    if "w4a4" not in kept:
        kept["w4a4"] = run(source, "w4a4")
    return kept["w4a4"]


def plan_of(name: str) -> Plan:
    """Of the first blocks alone, so that there is less to measure."""
    return without_ends(name).with_rules(
        [Rule(None, "a test", path=f"{part}.*") for part in ("up_blocks", "mid_block")]
    )


def run(source: Source, plan: str = "w4a8", **settings: Any) -> Artifact:
    return methods.build("mixdq", FEW | settings)(Denoiser.of(source.pipeline), plan_of(plan), source)


def test_bits_are_those_of_the_plan_and_lie_otherwise(of_words: Source, kept: dict[str, Artifact]) -> None:
    """No more bytes of weights, and no more bits of what is read."""
    denoiser = Denoiser.of(of_words.pipeline)
    model, plan = denoiser.model, plan_of("w4a4")
    before = copy.deepcopy(model.state_dict())
    artifact = once(kept, of_words)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    decided = plan.resolve(denoiser)
    sizes = {path: model.get_submodule(path).weight.numel() for path in artifact.layers}
    asked = sum(packed_bytes(sizes[path], decided[path, "weight"].grid.bits) for path in sizes)
    given = sum(packed_bytes(sizes[path], spec.weight.bits) for path, spec in artifact.layers.items())
    assert 0.95 * asked < given <= asked
    assert {spec.weight.bits for spec in artifact.layers.values()} == {2, 4, 8}
    assert {spec.input.bits for spec in artifact.layers.values() if spec.input} == {4, 8}
    moved = [p for p, spec in artifact.layers.items() if spec.weight.bits > decided[p, "weight"].grid.bits]
    assert moved


def test_content_is_told_by_structure_and_quality_by_noise(
    of_words: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no picture ever changes, content layers have nothing to lose, however the prediction does."""
    monkeypatch.setattr(Structure, "__call__", lambda self: 0.0)
    artifact, roles = run(of_words), Denoiser.of(of_words.pipeline).sites()
    bits = {path: spec.weight.bits for path, spec in artifact.layers.items()}
    spent = {path for path, width in bits.items() if width == 8 and roles[path] in CONTENT}
    assert sum(bits[p] for p in bits if roles[p] in CONTENT) < 4 * sum(roles[p] in CONTENT for p in bits)
    assert len(spent) < sum(width == 8 for width in bits.values())


def test_what_is_made_of_the_first_token_is_what_the_float_model_makes_of_it(
    of_words: Source, kept: dict[str, Artifact]
) -> None:
    pipe = of_words.pipeline
    artifact, roles = once(kept, of_words), Denoiser.of(pipe).sites()
    paths = [path for path in artifact.layers if roles[path] in READS_TEXT]
    assert {path for path, spec in artifact.layers.items() if spec.first} == set(paths)
    with torch.no_grad():
        words = pipe.text_encoder(pipe.tokenizer("b a", return_tensors="pt").input_ids)[0]
        for path in paths:
            want = pipe.unet.get_submodule(path)(words[0, 0])
            torch.testing.assert_close(artifact.tensors[f"{path}.first_output"], want, rtol=1e-4, atol=1e-5)
            assert str(artifact.layers[path].input) == "uint8/tensor"
    lowered = lower(copy.deepcopy(pipe.unet), artifact, torch.float32)
    path = paths[0]
    torch.testing.assert_close(
        lowered.get_submodule(path)(words)[0, 0], pipe.unet.get_submodule(path)(words)[0, 0]
    )
    exact = draw(pipe, [5], of_words.sampling)
    pipe.unet = lowered
    assert (draw(pipe, [5], of_words.sampling) - exact).abs().mean() < 0.1


def test_without_the_first_token_texts_stay_as_the_plan_has_them(of_words: Source) -> None:
    artifact, roles = run(of_words, "w8a8", first_token=False), Denoiser.of(of_words.pipeline).sites()
    assert not any(spec.first for spec in artifact.layers.values())
    assert not any(spec.input for path, spec in artifact.layers.items() if roles[path] in READS_TEXT)


def test_where_everything_has_eight_bits_nothing_is_measured(
    of_words: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "set_ranges", None)
    artifact = run(of_words, "w8a8")
    assert {spec.weight.bits for spec in artifact.layers.values()} == {8}
