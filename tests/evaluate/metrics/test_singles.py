from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.evaluate.metrics.singles import mean_number, share_change


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hits of two models that agree more often than chance: 95 and 92 in a hundred."""
    same = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    own = torch.rand(count, generator=torch.Generator().manual_seed(seed + 10_000))
    return same < 0.95, torch.where(own < 0.5, same, own * 2 - 1) < 0.92


def test_interval_of_a_share_holds_the_true_change_as_often_as_it_says() -> None:
    found = [share_change(*drawn(200, seed)) for seed in range(2000)]
    assert sum(low <= 0.03 <= high for low, high in found) / len(found) == pytest.approx(0.95, abs=0.02)


def test_equal_shares_of_all_hits_leave_doubt_by_their_number() -> None:
    every = torch.ones(256, dtype=torch.bool)
    low, high = share_change(every, every)
    assert low == pytest.approx(-high)
    assert 0.01 < high < 0.02
    assert share_change(torch.ones(1024, dtype=torch.bool), torch.ones(1024, dtype=torch.bool))[1] < high / 3


def test_change_of_a_mean_is_of_the_same_images() -> None:
    own = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 10
    number = mean_number("truth", "legal", {"float": own, "quantized": own - 0.5}, "dB", "", "", "")
    assert [number.change_low, number.change_high] == pytest.approx([-0.5, -0.5], abs=1e-3)
    assert number.high - number.low > 1  # type: ignore[operator]
