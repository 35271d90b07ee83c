from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.errors import MethodError
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme
from tests.conftest import make_one_level

pytestmark = pytest.mark.usefixtures("coarse")
FEW = {"samples": 6, "trajectories": 2, "iterations": 3}


@pytest.fixture
def small(source: Source) -> Source:
    pipeline = DDIMPipeline(make_one_level(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return replace(source, pipeline=pipeline, sampling=Sampling(4))


def run(source: Source, plan: str = "w8a8", **settings: Any) -> Artifact:
    return methods.build("tdq", FEW | settings)(Denoiser.of(source.pipeline), scheme(plan), source)


def test_every_activation_has_a_scale_for_every_t_and_one_zero_point(small: Source) -> None:
    artifact = run(small)
    assert artifact.steps.times == artifact.steps.groups == 4
    scales = {name: value for name, value in artifact.tensors.items() if is_range(name, "scale")}
    assert len(scales) > 20
    for name, scale in scales.items():
        zero_point = artifact.tensors[name.replace("_scale", "_zero_point")]
        assert scale.shape == zero_point.shape == (4,)
        assert len(zero_point.unique()) == 1
    assert any(len(scale.unique()) == 4 for scale in scales.values())
    grids = [spec.input for spec in artifact.layers.values() if spec.input]
    assert {grid.granularity for grid in grids} == {"step"}


def is_range(name: str, kind: str) -> bool:
    return name.endswith(f"_{kind}") and "weight" not in name


def test_without_iterations_it_is_one_scale_for_all_steps(small: Source) -> None:
    artifact = run(small, iterations=0)
    found = [value for name, value in artifact.tensors.items() if is_range(name, "scale")]
    assert all(len(value.unique()) == 1 for value in found)
    assert torch.stack([value[0] for value in found]).unique().numel() > 20


@pytest.mark.parametrize("plan", ["w4a16", "w8a8-dynamic"])
def test_schemes_without_ranges_are_refused_before_anything_is_recorded(plan: str, small: Source) -> None:
    with pytest.raises(MethodError, match="no activation a range"):
        run(small, plan)
    assert not list(small.cache.rglob("*.safetensors"))
