from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics import instruments
from stepquant.evaluate.metrics.instruments import Networks, Weights, load_networks
from stepquant.evaluate.metrics.measure import Batch
from stepquant.evaluate.metrics.number import Number
from stepquant.evaluate.metrics.pairs import PairMetric
from stepquant.evaluate.metrics.quality import judge
from stepquant.evaluate.networks.reader import View

NONE = Networks(None, None, None)


class Wide:
    digest, resize = "w1", "TF1 bilinear to 299"
    views = (View("FID", "KID", " (Inception)"), View("sFID"), View("IS", classes=True))

    def read(self, images: Tensor) -> dict[str, Tensor]:
        rows = images.flatten(1)
        return {"FID": rows[:, :6].clone(), "sFID": rows[:, 6:9].clone(), "IS": rows[:, :5].clone()}


class Likeness:
    """In place of LPIPS and of CLIP."""

    digest, resize = "l1", "bicubic to 24"

    def metric(self) -> PairMetric:
        return PairMetric("LPIPS", lambda a, b: (a - b).abs().flatten(1).mean(1), "lower", extractor="l1")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts]) + images.flatten(1).mean(1)


def batches(size: int = 16, count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    some = [torch.rand(3, 8, 3, size, size, generator=generator) for _ in range(count)]
    return [Batch(x[0], x[0] * 0.9, x[2], ["ab"] * 8, ["abcd"] * 8) for x in some]


def by_name(numbers: Sequence[Number], against: str | None = None) -> dict[str, Number]:
    return {x.name: x for x in numbers if against in (None, x.against)}


def test_without_weights_numbers_say_what_to_give() -> None:
    found = by_name(judge(iter(batches()), NONE, None).numbers)
    for name in ("FID", "sFID", "KID", "IS"):
        assert found[name].value is None
        assert found[name].unavailable == "give --inception PATH"
    assert found["LPIPS"].unavailable == "give --lpips PATH"
    assert "32x32" in found["FD-CH"].unavailable
    assert "CLIP score" not in found  # nobody gave prompts
    assert by_name(judge(iter(batches()), NONE, None, prompted=True).numbers)["CLIP score"].unavailable


def test_every_network_has_its_numbers() -> None:
    likeness = Likeness()
    networks = Networks(Wide(), likeness, likeness)  # type: ignore[arg-type]
    numbers = judge(iter(batches()), networks, None, prompted=True).numbers
    same, other = by_name(numbers, "float, same seeds"), by_name(numbers, "float, other seeds")
    assert same["FID"].value is not None
    assert (same["FID"].extractor, same["FID"].resize, same["FID"].n) == ("w1", "TF1 bilinear to 299", 32)
    assert same["sFID"].value is not None
    assert set(other) == {"KID"} | {
        f"{x} (Inception)" for x in ("precision", "recall", "density", "coverage")
    }
    assert same["LPIPS"].extractor == "l1"
    score = by_name(numbers)["IS"]
    assert score.low <= score.value <= score.high  # type: ignore[operator]
    assert score.reference != score.floor
    text = by_name(numbers)["CLIP score"]
    assert text.value == pytest.approx(2 + 0.45, abs=0.02)
    assert text.floor == pytest.approx(4 + 0.5, abs=0.02)  # other seeds have other prompts
    assert (text.against, text.resize) == ("prompts", "bicubic to 24")
    assert {x.name for x in numbers if x.unavailable} == {
        "FD-CH",
        "recognised",
        "FID",
        "sFID",
    }  # the last two against data


def test_no_images_are_named() -> None:
    with pytest.raises(EvaluationError, match="no images"):
        judge(iter(()), NONE, None)


def test_data_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    networks = Networks(Wide(), None, None)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="no images to compare with"):
        judge(iter(batches()), networks, str(tmp_path))


def test_the_networks_are_loaded_before_anything_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("inception", "lpips"):
        with pytest.raises(EvaluationError, match="No such file"):
            load_networks(Weights(**{name: tmp_path / "none.safetensors"}), prompted=False)
    with pytest.raises(EvaluationError, match="there are none"):
        load_networks(Weights(clip=tmp_path), prompted=False)
    monkeypatch.setattr(instruments, "load_inception", lambda file: Wide())
    cached = load_networks(Weights(inception=tmp_path), prompted=False).inception
    assert cached is not None
    assert set(cached.read(batches()[0].float)) == {"FID", "sFID", "IS"}
    assert list((tmp_path.parent).rglob("w1-1/*/*.safetensors")) or cached.folder.exists()  # type: ignore[attr-defined]
