from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMPipeline

from stepquant.evaluate.trajectory.probe import trace
from stepquant.evaluate.trajectory.time_confusion import MOST_SHOWN, confusion, spread, watch_embedding
from stepquant.evaluate.twins import Twins
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from tests.models.tiny import CASES, Case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_embedding_of_every_declared_unet_is_seen(case: Callable[[], Case]) -> None:
    model, given, changed = case()
    denoiser = Denoiser(model.eval())
    with torch.no_grad(), watch_embedding(model) as found:
        denoiser.predict(given)
        denoiser.predict(given | changed["t"])
    assert len(found) == 2
    for row, arguments in zip(found, (given, given | changed["t"])):
        t = arguments["timestep"].reshape(1)
        with torch.no_grad():
            expected = model.time_embedding(model.time_proj(t))[0]  # type: ignore[operator]
        torch.testing.assert_close(row, expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_confusion_is_the_argmax_of_cosines_by_hand() -> None:
    angles = torch.tensor([0.0, 0.3, 0.6, 0.9])
    theirs = [torch.tensor([torch.cos(x), torch.sin(x)]) for x in angles]
    ours = [
        7 * torch.tensor([torch.cos(x), torch.sin(x)]) for x in angles + torch.tensor([0.1, -0.2, 0.0, -0.2])
    ]
    found = confusion(ours, theirs, [3.0, 2.0, 1.0, 0.0])
    assert found is not None
    assert found["nearest"] == [0, 0, 2, 2]
    assert found["rate"] == 0.5
    assert found["worst"] == pytest.approx(float(torch.cos(torch.tensor(0.2))))
    assert found["cosine"][1][3] == pytest.approx(float(torch.cos(torch.tensor(0.8))))


def test_steps_of_the_same_time_are_no_confusion() -> None:
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    found = confusion(rows, rows, [5.0, 5.0, 0.0])
    assert found is not None
    assert found["rate"] == 0
    assert confusion([], [], []) is None  # a model without such a module


def test_a_float_twin_knows_every_time_and_a_forgetful_one_none(pipeline: DDIMPipeline) -> None:
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        other.unet.time_embedding.linear_2.weight.zero_()
    same, lost = (
        trace(Twins(pipeline, twin), [1, 2], Sampling(6)).times for twin in (copy.deepcopy(pipeline), other)
    )
    assert same is not None
    assert lost is not None
    assert (same["nearest"], same["rate"]) == ([0, 1, 2, 3, 4, 5], 0)
    assert same["worst"] == pytest.approx(1)
    assert len(set(lost["nearest"])) == 1  # all times look alike
    assert lost["rate"] == pytest.approx(5 / 6)


def test_few_steps_are_shown() -> None:
    assert spread(3) == [0, 1, 2]
    assert len(spread(1000)) == MOST_SHOWN
    assert spread(1000)[0] == 0
    assert spread(1000)[-1] == 999
