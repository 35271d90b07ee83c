from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import Pick
from stepquant.calib.record import Source
from stepquant.errors import MethodError
from stepquant.methods import apqdm
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme
from tests.conftest import make_one_level
from tests.methods.test_tdq import is_range

pytestmark = pytest.mark.usefixtures("coarse")
FEW = {"samples": 16, "chosen": 8, "trajectories": 8, "groups": 2, "iterations": 20}


@pytest.fixture
def small(source: Source) -> Source:
    pipeline = DDIMPipeline(make_one_level(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return replace(source, pipeline=pipeline, sampling=Sampling(4))


def run(source: Source, plan: str = "w4a4", **settings: Any) -> Artifact:
    return methods.build("apqdm", FEW | settings)(Denoiser.of(source.pipeline), scheme(plan), source)


def test_every_activation_has_as_many_ranges_as_groups_and_a_row_for_every_step(
    small: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Pick]] = []
    own = Source.record
    monkeypatch.setattr(Source, "record", lambda self, picks: asked.append(list(picks)) or own(self, picks))
    doubts: list[torch.Tensor] = []
    ask = apqdm.most_uncertain
    monkeypatch.setattr(
        apqdm, "most_uncertain", lambda found, *given: doubts.append(found) or ask(found, *given)
    )
    artifact = run(small, even=0.0)
    assert artifact.steps.times == artifact.steps.groups == 4
    scales = [value for name, value in artifact.tensors.items() if is_range(name, "scale")]
    assert len(scales) > 20
    assert all(value.shape == (4,) for value in scales)
    assert max(len(value.unique()) for value in scales) == 2
    first, further = (next(picks for picks in asked if len(picks) == count) for count in (16, 8))
    assert Counter(pick.step for pick in first) == dict.fromkeys(range(4), 4)
    assert {pick.step for pick in further} == {int(doubts[0].argmax())}
    assert not set(first) & set(further), "they are of trajectories that gave none"


def test_further_records_and_groups_change_the_ranges(small: Source) -> None:
    quick = {"iterations": 2}
    plain, more, fewer = (
        run(small, **quick, **one) for one in ({"chosen": 0}, {}, {"chosen": 0, "groups": 1})
    )
    names = [name for name in plain.tensors if is_range(name, "scale")]
    assert any(not torch.equal(plain.tensors[name], more.tensors[name]) for name in names)
    assert all(len(fewer.tensors[name].unique()) == 1 for name in names)


@pytest.mark.parametrize("plan", ["w4a16", "w8a8-dynamic"])
def test_schemes_without_ranges_are_refused_before_anything_is_recorded(plan: str, small: Source) -> None:
    with pytest.raises(MethodError, match="no activation a range"):
        run(small, plan)
    assert not list(small.cache.rglob("*.safetensors"))
