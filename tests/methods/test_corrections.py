"""Corrections behind a method: how they are named, what they do to the whole denoiser, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from stepquant import hub, methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source, trajectory_seed
from stepquant.errors import MethodError, UnknownNameError
from stepquant.models.denoiser import Denoiser
from stepquant.models.pipelines.unconditional import denoise, last
from stepquant.models.sampling import Sampling
from stepquant.runtime.lower import lower
from tests.conftest import without_ends


def made(source: Source, name: str, **settings: Any) -> Artifact:
    return methods.build(name, settings)(Denoiser.of(source.pipeline), without_ends("w4a4"), source)


def errors(source: Source, artifact: Artifact) -> list[float]:
    """Mean squared error of the prediction at every step, on states that nothing was fitted on."""
    model = Denoiser.of(source.pipeline)
    lowered = Denoiser(lower(copy.deepcopy(model.model), artifact, torch.float32))
    fresh = dataclasses.replace(source, seed=source.seed + 1)
    data, found = fresh.record(every(4, range(source.sampling.steps))), []
    for step in range(source.sampling.steps):
        records = data.subset((data.steps() == step).nonzero().flatten().tolist()).take(range(4))
        with torch.no_grad():
            exact, got = (m.predict(records.arguments) for m in (model, lowered))
        found.append((got - exact).square().mean().item())
    return found


@pytest.mark.parametrize("name, left", [("ptqd", 1.0), ("d2dpm", 0.98)])
def test_the_error_of_the_prediction_falls(source: Source, name: str, left: float) -> None:
    plain = made(source, "minmax", samples=32)
    corrected = made(source, f"minmax+{name}", **{"samples": 32, f"{name}.trajectories": 24})
    assert corrected.steps is not None
    assert corrected.steps.channels == 3
    before, after = errors(source, plain), errors(source, corrected)
    assert sum(after) < left * sum(before)
    same = {name: value for name, value in corrected.tensors.items() if not name.startswith("steps.")}
    assert all(torch.equal(value, plain.tensors[name]) for name, value in same.items())


def test_following_keeps_the_mean_of_the_states(source: Source) -> None:
    """The trajectories that it was fitted on end with the mean of the float model's."""
    seeds = [trajectory_seed(source.seed, number) for number in range(24)]
    exact = last(denoise(source.pipeline, seeds, source.sampling))
    gaps = []
    for name, settings in (("minmax", {}), ("minmax+tac", {"tac.samples": 24})):
        pipeline = copy.deepcopy(source.pipeline)
        hub.attach(
            pipeline.unet, made(source, name, **{"minmax.samples" if settings else "samples": 32}, **settings)
        )
        got = last(denoise(pipeline, seeds, source.sampling))
        gaps.append((got - exact).mean((0, 2, 3)).abs().mean().item())
    assert gaps[1] < 0.05 * gaps[0]


def test_names_that_make_no_sense_are_errors() -> None:
    with pytest.raises(MethodError, match="corrects what another method made"):
        methods.build("ptqd")
    for name in ("ptqd+minmax", "minmax+ptq4dm", "d2dpm+ptqd"):
        with pytest.raises(MethodError, match="is not a method and a correction"):
            methods.build(name)
    with pytest.raises(UnknownNameError):
        methods.build("minmax+d2dpn")


def test_fields_find_their_part() -> None:
    built = methods.build("brecq+d2dpm", {"iterations": 7, "form": "stochastic", "d2dpm.trajectories": 3})
    fields = built.model_dump()
    assert fields["method"]["iterations"] == 7
    assert (fields["correction"]["form"], fields["correction"]["trajectories"]) == ("stochastic", 3)
    with pytest.raises(MethodError, match="both parts have a field 'trajectories'"):
        methods.build("brecq+d2dpm", {"trajectories": 3})
    with pytest.raises(UnknownNameError, match="fromm"):
        methods.build("brecq+d2dpm", {"fromm": 1})
    with pytest.raises(UnknownNameError, match="gac"):
        methods.build("brecq+d2dpm", {"gac.iterations": 1})
    with pytest.raises(MethodError, match="field 'trajectories'"):
        methods.build("minmax+ptqd", {"ptqd.trajectories": 0})


def test_a_correction_that_the_sampler_cannot_carry_is_refused(source: Source) -> None:
    with pytest.raises(MethodError, match="no noise that could absorb"):
        made(source, "minmax+ptqd", samples=8, variance="absorb")
    noisy = dataclasses.replace(source, sampling=Sampling(source.sampling.steps, "ddpm"))
    with pytest.raises(MethodError, match="cannot be told from the noise"):
        made(noisy, "minmax+tac", **{"minmax.samples": 8, "tac.samples": 2})
