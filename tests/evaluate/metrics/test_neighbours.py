from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from stepquant.evaluate.metrics import neighbours
from stepquant.evaluate.metrics.neighbours import (
    PAIRS,
    compare_neighbours,
    kernel_distance,
    radii,
    rows_at_once,
)


def normal(count: int, seed: int, shift: float = 0.0, width: int = 4) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def distance_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    pairs = list(itertools.permutations(range(len(a)), 2))
    within = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs)
    across = sum(k(a[i], b[j]) + k(b[i], a[j]) for i, j in pairs)
    return (within - across) / len(pairs)


def test_kernel_distance_equals_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(13, 0), normal(13, 1, 0.5)
    expected = distance_by_hand(a.double().numpy(), b.double().numpy())
    assert kernel_distance(a, b)[0] == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(neighbours, "CHUNK", 5)
    assert kernel_distance(a, b)[0] == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_near_that_of_torchmetrics() -> None:
    """Which also counts the pairs (a_i, b_i): a difference of order 1/n."""
    a, b = normal(600, 2, width=16), normal(600, 3, 0.4, width=16)
    assert kernel_distance(a, b)[0] == pytest.approx(float(poly_mmd(a, b)), rel=0.02)


def test_error_of_the_kernel_distance_is_the_scatter_of_fresh_draws() -> None:
    draws = [kernel_distance(normal(200, 2 * i), normal(200, 2 * i + 1, 0.5)) for i in range(60)]
    values, errors = zip(*draws)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)
    same = [kernel_distance(normal(200, 2 * i), normal(200, 2 * i + 1))[0] for i in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 60**0.5  # unbiased: zero on average


def neighbours_by_hand(real: np.ndarray, fake: np.ndarray) -> dict[str, list[float]]:
    def reach(x: np.ndarray, i: int, k: int) -> float:
        return sorted(float(np.linalg.norm(x[i] - y)) for j, y in enumerate(x) if j != i)[k - 1]

    gap = lambda x, y: float(np.linalg.norm(x - y))  # noqa: E731
    near_real = [reach(real, i, 3) for i in range(len(real))]
    wide_real = [reach(real, i, 5) for i in range(len(real))]
    near_fake = [reach(fake, i, 3) for i in range(len(fake))]
    return {
        "precision": [float(any(gap(f, r) <= d for r, d in zip(real, near_real))) for f in fake],
        "recall": [float(any(gap(f, r) <= d for f, d in zip(fake, near_fake))) for r in real],
        "density": [sum(gap(f, r) < d for r, d in zip(real, wide_real)) / 5 for f in fake],
        "coverage": [float(any(gap(f, r) < d for f in fake)) for r, d in zip(real, wide_real)],
    }


@pytest.mark.parametrize("chunk", [7, 1024])
def test_neighbours_equal_their_definitions(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    real, fake = normal(40, 5), normal(31, 6, 0.7)
    found = compare_neighbours(real, fake)
    for name, expected in neighbours_by_hand(real.double().numpy(), fake.double().numpy()).items():
        assert getattr(found, name).tolist() == pytest.approx(expected), name
        assert 0 < np.mean(expected) < 1  # a case that can tell


def test_memory_is_that_of_a_number_of_pairs() -> None:
    assert rows_at_once(100) == 1024
    assert all(rows_at_once(count) * count <= PAIRS for count in (600, 5000, 100_000))
    assert rows_at_once(10**9) == 1


def test_radius_leaves_the_sample_itself_out() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert radii(line, 1).tolist() == [1, 1, 2, 4]


def test_collapsed_fakes_are_precise_and_recall_nothing() -> None:
    real = normal(200, 7)
    fake = real[:1] + 1e-3 * normal(200, 8)
    found = compare_neighbours(real, fake)
    assert found.precision.mean() > 0.95
    assert found.recall.mean() < 0.05
    assert found.coverage.mean() < 0.1
