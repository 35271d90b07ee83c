from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from stepquant.evaluate.metrics import inception_score as classes
from stepquant.evaluate.metrics.inception_score import ClassSums, add_classes, inception_score, score_interval


def logits(count: int, seed: int = 0, width: int = 10) -> torch.Tensor:
    return 2 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def streamed(rows: torch.Tensor, size: int) -> ClassSums:
    sums = None
    for part in rows.split(size):
        sums = add_classes(sums, part)
    assert sums is not None
    return sums


def by_definition(rows: torch.Tensor) -> float:
    p = torch.softmax(rows.double(), 1).numpy()
    return float(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1))))


@pytest.mark.filterwarnings("ignore")
def test_score_is_that_of_torchmetrics() -> None:
    class Logits(torch.nn.Module):
        num_features = 10

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1)[:, :10]

    rows = logits(60)
    theirs = InceptionScore(feature=Logits(), splits=1)
    theirs.update(rows[:, :, None, None])
    assert inception_score(streamed(rows, 7)) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 20, 45])
def test_score_is_the_mean_over_splits_however_images_arrive(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(classes, "SPLIT", 20)
    rows = logits(45)
    expected = np.mean([by_definition(part) for part in rows[:40].split(20)])
    sums = streamed(rows, batch)
    assert [split.count for split in sums.splits] == [20, 20, 5]
    assert inception_score(sums) == pytest.approx(expected)  # the last quarter of a split is left out


def test_interval_holds_the_score_and_scatters_like_fresh_draws() -> None:
    scores, widths = [], []
    for seed in range(30):
        sums = streamed(logits(400, seed), 50)
        low, high = score_interval(sums)
        assert low <= inception_score(sums) <= high
        scores.append(inception_score(sums))
        widths.append((high - low) / 2)
    assert np.mean(widths) == pytest.approx(2.13 * np.std(scores), rel=0.4)


def test_sure_and_diverse_images_reach_the_number_of_classes() -> None:
    rows = 100 * torch.eye(10).repeat(5, 1)
    assert inception_score(streamed(rows, 9)) == pytest.approx(10)
    assert inception_score(streamed(rows[:1].repeat(20, 1), 9)) == pytest.approx(1)
