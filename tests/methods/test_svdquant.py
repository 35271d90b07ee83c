from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline, UNet2DModel

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.errors import MethodError
from stepquant.evaluate.cost import coverage
from stepquant.fit import low_rank
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.cpu.lasting import Recorded
from stepquant.runtime.cpu.recording import Recording
from stepquant.runtime.layers.linear import LowRankBranch
from stepquant.runtime.lower import lower
from tests.contracts.smallest import digest

FEW = {"samples": 16, "trajectories": 4, "batch": 8, "rank": 4, "grid": 2, "rows": 128}
BRANCHED = ("q", "k", "v", "attn_out", "ff_in", "ff_out")


@pytest.fixture
def of_classes(class_pipeline: DiTPipeline, source: Source) -> Source:
    return replace(source, pipeline=class_pipeline, sampling=Sampling(3), batch=2)


def run(source: Source, plan: str = "w4a4", **settings: Any) -> Artifact:
    return methods.build("svdquant", FEW | settings)(Denoiser.of(source.pipeline), scheme(plan), source)


@pytest.mark.usefixtures("coarse")
def test_the_linears_of_the_paper_have_a_branch_and_no_others(of_classes: Source) -> None:
    model = of_classes.pipeline.transformer
    before = copy.deepcopy(model.state_dict())
    artifact = run(of_classes)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    roles = Denoiser.of(of_classes.pipeline).sites()
    assert {roles[path] for path, spec in artifact.layers.items() if spec.rank} == set(BRANCHED)
    for path, spec in artifact.layers.items():
        assert spec.rank in (0, 4)
        if roles.get(path) not in BRANCHED:  # tables have none
            assert not spec.rank
            assert not spec.balanced, "embeddings, modulation and the last layer are left out"
    sides = [
        artifact.tensors[f"{p}.low_rank.{s}"]
        for p, x in artifact.layers.items()
        if x.rank
        for s in ("down", "up")
    ]
    assert {side.dtype for side in sides} == {torch.float16}, "the branch is in 16 bits"
    assert any(spec.balanced for spec in artifact.layers.values())


@pytest.mark.usefixtures("coarse")
def test_work_and_bytes_of_the_branch_are_counted_and_the_integers_still_run(of_classes: Source) -> None:
    artifact, source = run(of_classes), Denoiser.of(of_classes.pipeline)
    lowered = lower(copy.deepcopy(source.model), artifact, torch.float32)
    (records,) = of_classes.record(every(1, [1])).batches(2)
    rows = {row["path"]: row for row in coverage(source, Denoiser(lowered), records.arguments)}
    path = "transformer_blocks.0.attn1.to_q"
    whole, branch = rows[path], rows[f"{path}.low_rank"]
    assert (whole["integer"], branch["integer"]) == (True, False)
    assert branch["macs"] == whole["macs"] * 4 * (32 + 32) // (32 * 32)
    assert branch["bytes"] == 2 * 4 * (32 + 32)
    assert branch["weight"] == "float"
    assert "low rank" in branch["reason"]
    assert branch["role"] == "q"


@pytest.mark.usefixtures("coarse")
@pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")
def test_recorded_calls_have_the_bytes_of_the_first(of_classes: Source) -> None:
    """Sides are packed once, before anything is recorded, and what branches add needs no tensor."""
    lowered = lower(copy.deepcopy(of_classes.pipeline.transformer), run(of_classes, "w4a8-dynamic"))
    own = lowered.__dict__["forward"]
    (records,) = of_classes.record(every(1, [1])).batches(2)
    with torch.no_grad():
        want, *later = (lowered(**records.arguments, return_dict=False)[0] for _ in range(4))
    assert all(torch.equal(one, want) for one in later)
    (made,) = own.sequences.values()
    assert isinstance(made, Recorded)
    names = [call.func.name() for call in recorded_calls(lowered, records.arguments)]
    assert names.count("stepquant::multiply_side") == sum(
        isinstance(one, LowRankBranch) for one in lowered.modules()
    )
    assert "aten::constant_pad_nd" not in names


def recorded_calls(model: torch.nn.Module, arguments: dict[str, Any]) -> list[Any]:
    with torch.no_grad(), Recording([]) as recording:
        type(model).forward(model, **arguments)
    return recording.calls


@pytest.mark.usefixtures("coarse")
def test_the_published_numbers(source: Source) -> None:
    """Rank 32, a grid of 20 strengths, prompts by the hundred, and GPTQ as its own option."""
    fast, paper = (methods.build("svdquant", {"preset": preset}) for preset in ("fast", "paper"))
    assert fast.model_dump()["rank"] == paper.model_dump()["rank"] == 32
    known = {name: paper.model_dump()[name] for name in ("samples", "trajectories", "grid", "rounds", "gptq")}
    assert known == {"samples": 128, "trajectories": 128, "grid": 20, "rounds": 100, "gptq": True}
    assert not fast.model_dump()["gptq"]


@pytest.mark.usefixtures("coarse")
def test_fields_change_what_they_say(of_classes: Source) -> None:
    path = "transformer_blocks.1.ff.net.0.proj"
    plain = run(of_classes)
    compensated, alone, still = (run(of_classes, **o) for o in ({"gptq": True}, {"rank": 0}, {"grid": 0}))
    names = [f"{path}.{name}" for name in ("low_rank.up", "weight_scale", "weight")]
    same = [torch.equal(plain.tensors[name], compensated.tensors[name]) for name in names]
    assert same == [True, True, False], "GPTQ rounds the same rest otherwise"
    assert not any(spec.rank for spec in alone.layers.values())
    assert any(spec.balanced for spec in alone.layers.values())
    assert not any(spec.balanced for spec in still.layers.values())
    assert not any(name.endswith("input_factors") for name in still.tensors)
    with pytest.raises(MethodError, match="rank and grid"):
        run(of_classes, rank=0, grid=0)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("settings", [{}, {"gptq": True}])
def test_a_second_run_takes_divisions_from_the_journal(
    settings: dict[str, Any], of_classes: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(of_classes, **settings)
    monkeypatch.setattr(low_rank, "best_division", None)
    assert digest(run(of_classes, **settings)) == digest(first)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("plan", ["w4a8-dynamic", "w4a16"])
def test_schemes_without_ranges_of_activations(plan: str, of_classes: Source) -> None:
    artifact = run(of_classes, plan)
    assert any(spec.rank for spec in artifact.layers.values())
    assert not any(name.endswith("input_scale") for name in artifact.tensors)
    lower(copy.deepcopy(of_classes.pipeline.transformer), artifact)


def test_more_directions_than_a_linear_has_are_refused_before_anything_is_recorded(
    of_classes: Source,
) -> None:
    with pytest.raises(MethodError, match="rank 64 is wider than") as error:
        run(of_classes, rank=64)
    assert "at most 32" in str(error.value)
    assert not list(of_classes.cache.rglob("*.safetensors"))


def test_a_model_of_convolutions_alone_is_refused(source: Source) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = UNet2DModel(
        8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, add_attention=False, **blocks
    )
    pipeline = DDIMPipeline(model.eval(), DDIMScheduler())
    with pytest.raises(MethodError, match="no linear to divide"):
        run(replace(source, pipeline=pipeline))
