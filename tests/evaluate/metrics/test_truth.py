from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.instruments import Networks, Weights, load_networks
from stepquant.evaluate.metrics.measure import Batch
from stepquant.evaluate.metrics.number import Number
from stepquant.evaluate.metrics.parts import Parts, named, read_parts
from stepquant.evaluate.metrics.quality import Judged, judge
from stepquant.evaluate.metrics.truth import Truth, psnr

COUNT = 40


@pytest.fixture(scope="module")
def parts() -> Parts:
    return read_parts()


def legal(parts: Parts, seed: int, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(len(kind.covers), (count,), generator=generator) for kind in parts.kinds]
    return parts.compose(torch.stack(columns, 1))


def noisy(images: Tensor, deviation: float, seed: int = 9) -> Tensor:
    return images + deviation * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def numbers(judged: Judged) -> dict[str, Number]:
    return {x.name: x for x in judged.numbers}


@pytest.mark.parametrize("deviation", [0.01, 0.1])
def test_noise_has_the_decibels_of_its_variance(parts: Parts, deviation: float) -> None:
    values = Truth(parts).read(noisy(legal(parts, 0), deviation))
    expected = -20 * torch.tensor(deviation).log10()
    assert float(psnr(values).mean()) == pytest.approx(float(expected), abs=0.05)


def test_truth_and_the_share_of_broken_images_beside_those_of_float(parts: Parts) -> None:
    clean, other = legal(parts, 1), legal(parts, 2)
    ours = torch.cat([noisy(clean[:30], 0.02), noisy(clean[30:], 0.25)]).clamp(0, 1)
    batches = [
        Batch(noisy(clean[i : i + 20], 0.01).clamp(0, 1), ours[i : i + 20], other[i : i + 20])
        for i in (0, 20)
    ]
    judged = judge(iter(batches), Networks(truth=Truth(parts)), None)
    found = numbers(judged)
    truth, broken = found["truth"], found["broken"]
    assert (truth.against, truth.unit, truth.better, truth.n) == ("legal images", "dB", "higher", COUNT)
    assert truth.extractor == broken.extractor == parts.digest
    assert truth.low < truth.value < truth.high < truth.reference < truth.floor == 100  # type: ignore[operator]
    assert (broken.value, broken.reference, broken.floor) == (25, 0, 0)
    # Wilson's interval of 10 in 40.
    assert (broken.low, broken.high) == (pytest.approx(14.19, abs=0.01), pytest.approx(40.19, abs=0.01))
    assert json.loads(json.dumps([asdict(x) for x in judged.portions]))[0]["name"] == "background"
    for name in ("area", "float", "quantized"):
        assert sum(getattr(x, name) for x in judged.portions) == pytest.approx(100)


def test_the_part_that_is_damaged_is_named(parts: Parts) -> None:
    clean = legal(parts, 3)
    glasses = parts.nearest(clean).picked[:, 4]
    places = parts.kinds[4].covers[glasses].unflatten(1, parts.size)[:, None]
    damaged = (clean + 0.05 * places * torch.where(clean > 0.5, -1.0, 1.0)).float()
    judged = judge(iter([Batch(clean, damaged)]), Networks(truth=Truth(parts)), None)
    assert "100 % of the error is in glasses" in numbers(judged)["truth"].note
    assert judged.portions[4].quantized == pytest.approx(100)
    assert judged.portions[4].float == 0
    assert judged.portions[4].area == pytest.approx(100 * float(places.mean()))


def test_the_data_or_the_user_say_which_images_are_legal(parts: Parts) -> None:
    assert load_networks(Weights(), "characters", prompted=False).truth is not None
    assert load_networks(Weights(), "cifar10", prompted=False).truth is None
    assert load_networks(Weights(), prompted=False).truth is None
    asked = load_networks(Weights(truth=named("characters")), "photos", prompted=False).truth
    assert asked is not None
    assert asked.digest == parts.digest
    assert str(named("mine.npz")) == "mine.npz"
    small = [Batch(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))]
    with pytest.raises(EvaluationError, match="not composed of these parts") as error:
        judge(iter(small), Networks(truth=asked), None)
    assert "8x8" in str(error.value)
    assert "truth" not in numbers(judge(iter(small), Networks(), None))
