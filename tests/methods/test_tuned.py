"""The methods that smooth, dilate and fine-tune: qncd, dilatequant, quest and efficientdm, end to end on a small model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.grid import Grid
from stepquant.core.steps import StepTable
from stepquant.errors import MethodError
from stepquant.evaluate.cost import coverage
from stepquant.methods.qncd import correction_of
from stepquant.methods.quest import SENSITIVE
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent
from stepquant.quant.schemes import TIMES, scheme
from stepquant.runtime.lower import lower
from tests.conftest import make_one_level

pytestmark = pytest.mark.usefixtures("coarse")
RECORDS = {"samples": 16, "trajectories": 4, "range_trajectories": 2, "batch": 8}
FEW: dict[str, dict[str, Any]] = {
    "qncd": RECORDS | {"iterations": 2, "step_iterations": 2},
    "dilatequant": RECORDS | {"iterations": 4},
    "quest": RECORDS | {"iterations": 0, "time_iterations": 2, "tuning_iterations": 10},
    "efficientdm": RECORDS | {"iterations": 16, "rank": 4},
}


@pytest.fixture
def small(source: Source) -> Source:
    pipeline = DDIMPipeline(make_one_level(groups=4), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return replace(source, pipeline=pipeline, sampling=Sampling(4))


def run(source: Source, name: str, plan: str = "w4a8", **settings: Any) -> Artifact:
    return methods.build(name, FEW[name] | settings)(Denoiser.of(source.pipeline), scheme(plan), source)


def test_convolutions_behind_the_embedding_are_smoothed_and_run_in_integers(small: Source) -> None:
    artifact, denoiser = run(small, "qncd"), Denoiser.of(small.pipeline)
    smoothed = {path for path, spec in artifact.layers.items() if spec.balanced}
    assert smoothed == {path for path in artifact.layers if path.endswith("conv2")} != set()
    for path in smoothed:
        factors = artifact.tensors[f"{path}.input_factors"]
        assert factors.max() <= 1
        assert factors.min() < 0.9
    plain = run(small, "qncd", smooth=False, inter=False)
    assert not any(spec.balanced for spec in plain.layers.values())
    assert plain.steps is None
    lowered = lower(copy.deepcopy(denoiser.model), artifact, torch.float32)
    (records,) = small.record(every(1, [1])).batches(2)
    rows = {row["path"]: row for row in coverage(denoiser, Denoiser(lowered), records.arguments)}
    assert all(rows[path]["integer"] for path in smoothed)


def test_mean_errors_become_a_correction_of_every_t() -> None:
    times = torch.tensor([900.0, 600.0, 600.0, 300.0])
    table = StepTable.of(times)
    made = correction_of([0.0, 0.5, 0.25, -1.0], times, table, 2)
    assert made.bias.tolist() == [[0.0, 0.0], [-0.5, -0.5], [1.0, 1.0]]
    assert made(torch.ones(1, 2, 3), torch.tensor([1])).unique().tolist() == [0.5]


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, words: str) -> None:
        self.heard.append(words)


def test_states_that_cannot_be_noised_again_are_said(small: Source) -> None:
    ears, method = Listening(), methods.build("qncd", FEW["qncd"])
    flow = replace(small, progress=ears)
    flow.pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert method.mean_errors(None, flow) == []  # type: ignore[attr-defined]
    assert "cannot be noised again" in ears.heard[0]


def test_ranges_by_step_stand_beside_dilated_weights(small: Source) -> None:
    artifact = run(small, "dilatequant")
    dilated = [path for path, spec in artifact.layers.items() if spec.balanced]
    assert dilated
    for path in dilated:
        assert float(artifact.tensors[f"{path}.input_factors"].max()) <= 1 + 1e-6
    ranged = [spec.input for spec in artifact.layers.values() if spec.input]
    assert {grid.granularity for grid in ranged} == {"step"}
    assert artifact.steps.groups == 4
    plain = run(small, "dilatequant", dilation=False, by_step="never")
    assert not any(spec.balanced for spec in plain.layers.values())
    assert plain.steps is None


def test_quest_changes_the_weights_of_its_layers_alone(small: Source) -> None:
    tuned, base = (run(small, "quest", weight_rate=0.05, **settings) for settings in (
        {}, {"time_iterations": 0, "tuning_iterations": 0}))  # fmt: skip
    roles = Denoiser.of(small.pipeline).sites()
    changed = {
        roles[path]
        for path in tuned.layers
        if not torch.equal(tuned.tensors[f"{path}.weight"], base.tensors[f"{path}.weight"])
    }
    assert changed <= {*SENSITIVE, *TIMES}
    assert changed & set(SENSITIVE)
    assert {spec.input.granularity for spec in tuned.layers.values() if spec.input} == {"step"}
    scales = [name for name in tuned.tensors if name.endswith("input_scale")]
    assert any(not torch.equal(tuned.tensors[name], base.tensors[name]) for name in scales)


def test_quest_tunes_all_weights_and_their_scales_where_that_is_asked_for(small: Source) -> None:
    asked = {"tuned": "all", "tuning_iterations": 20, "weight_rate": 0.02, "weight_scale_rate": 1e-3}
    tuned, base = (run(small, "quest", **asked | few) for few in (
        {}, {"time_iterations": 0, "tuning_iterations": 0}))  # fmt: skip
    narrow = [path for path, spec in tuned.layers.items() if spec.weight.bits == 4]
    roles = Denoiser.of(small.pipeline).sites()
    for leaf in ("weight", "weight_scale"):
        changed = {
            roles[p]
            for p in narrow
            if not torch.equal(tuned.tensors[f"{p}.{leaf}"], base.tensors[f"{p}.{leaf}"])
        }
        assert "conv" in changed - {*SENSITIVE, *TIMES}


def test_adapters_are_rounded_with_the_weights_and_none_is_left(small: Source) -> None:
    tuned, base = run(small, "efficientdm", adapter_rate=0.02), run(small, "efficientdm", iterations=0)
    assert not any(spec.rank for spec in tuned.layers.values())
    assert tuned.tensors.keys() == base.tensors.keys()
    differ = [not torch.equal(tuned.tensors[f"{path}.weight"], base.tensors[f"{path}.weight"]) for path in tuned.layers]  # fmt: skip
    assert any(differ)
    narrow = [path for path, spec in tuned.layers.items() if spec.weight == Grid.parse("int4/channel")]
    assert any(
        not torch.equal(tuned.tensors[f"{p}.weight_scale"], base.tensors[f"{p}.weight_scale"]) for p in narrow
    )


def test_models_and_schemes_that_they_are_not_for_are_refused(
    small: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MethodError, match="no activation a range that could shrink"):
        run(small, "dilatequant", "w4a16")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = UNet2DModel(
        8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, add_attention=False, **blocks
    )
    convolutions = replace(small, pipeline=DDIMPipeline(model.eval(), DDIMScheduler()))
    with pytest.raises(MethodError, match="no layer of an attention or a feed-forward"):
        run(convolutions, "quest")
    monkeypatch.setattr("stepquant.methods.qncd.scaled_channels", lambda _: [])
    for asked in ({"smooth": True}, {"inter": False}):
        with pytest.raises(MethodError, match="no embedding of the step"):
            run(small, "qncd", **asked)
    assert not list(small.cache.rglob("*.safetensors"))
    assert run(convolutions, "quest", tuned="all").layers


@pytest.mark.parametrize("name", ["quest", "efficientdm"])
def test_who_asks_to_learn_guidance_where_there_is_none_is_told(small: Source, name: str) -> None:
    ears, told = Listening(), "no guidance in this pipeline"
    plain, asked = (run(replace(small, progress=ears), name, guided=wanted) for wanted in (False, True))
    assert sum(told in words for words in ears.heard) == 1
    assert plain.tensors.keys() == asked.tensors.keys()
    assert all(torch.equal(value, asked.tensors[key]) for key, value in plain.tensors.items())
    straight = run(small, name, along=4.0)
    assert any(not torch.equal(value, straight.tensors[key]) for key, value in plain.tensors.items())
