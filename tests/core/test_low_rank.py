from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from stepquant.core import low_rank
from stepquant.core.low_rank import LowRank, balance, directions, divide, nearest


def weight_of(outputs: int, inputs: int, decay: float = 0.9) -> Tensor:
    """Singular values that fall, as those of trained weights do."""
    generator = Generator().manual_seed(0)
    sides = (torch.randn(size, min(outputs, inputs), generator=generator) for size in (outputs, inputs))
    left, right = (torch.linalg.qr(side)[0] for side in sides)
    return left * decay ** torch.arange(min(outputs, inputs)) @ right.T


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96)])
def test_no_matrix_of_that_rank_is_nearer(
    exact: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(low_rank, "EXACT", 0)
    weight, rank = weight_of(*shape), 6
    down, up = directions(weight, rank, Generator().manual_seed(1))
    left, values, right = np.linalg.svd(weight.numpy().astype(np.float64), full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert np.linalg.norm((up @ down).numpy() - best) < 1e-2 * np.linalg.norm(best)
    lost = torch.linalg.norm(weight - up @ down).item()
    assert lost == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-3)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-3), "sixteen bits suit both alike"


def test_the_branch_reads_inputs_that_nobody_has_multiplied() -> None:
    weight, factors = weight_of(24, 16), torch.linspace(0.1, 10, 16)
    x = torch.randn(5, 16, generator=Generator().manual_seed(2))
    branch, dense = nearest(weight / factors, 16, Generator(), factors)
    assert branch.down.dtype == branch.up.dtype == torch.float16
    torch.testing.assert_close(branch(x), x @ weight.T, rtol=0.01, atol=0.01)
    torch.testing.assert_close((x * factors) @ dense.T, branch(x), rtol=1e-4, atol=1e-4)


def test_each_turn_is_kept_only_where_it_errs_less() -> None:
    weight, step = weight_of(32, 32), 0.05
    errors: list[float] = []

    def rounded(rest: Tensor) -> Tensor:
        return (rest / step).round().clamp(-7, 7) * step

    def error(branch: LowRank, rest: Tensor) -> float:
        errors.append(float((branch.dense() + rest - weight).norm()))
        return errors[-1]

    best, least = divide(weight, 4, Generator(), rounds=20, rounded=rounded, error=error)
    assert 2 < len(errors) < 20, "it ends when an error rises"
    assert errors[-1] >= errors[-2]
    assert least == min(errors) < errors[0]
    again, one = divide(weight, 4, Generator(), rounds=1, rounded=rounded, error=error)
    assert one == errors[0]
    assert not torch.equal(best.down, again.down)
    plain = float((rounded(weight) - weight).norm())
    assert least < 0.9 * plain


def test_as_many_directions_as_there_are_leave_nothing_to_round() -> None:
    weight = weight_of(20, 12)
    branch, dense = nearest(weight, 12, Generator())
    assert (weight - dense).norm() < 1e-3 * weight.norm()
    assert branch.up.shape == (20, 12)


def test_balancing_moves_outliers_from_inputs_to_weights() -> None:
    inputs = torch.tensor([100.0, 1.0, 0.01, 0.0])
    weight = torch.ones(3, 4) * torch.tensor([1.0, 1.0, 1.0, 2.0])
    flat = inputs * balance(inputs, weight, 1.0, 0.0)
    assert torch.allclose(flat[:3], flat[0].expand(3)), "all channels reach equally far"
    half = balance(inputs, weight, 0.5, 0.5)
    both = (inputs * half)[:3], (weight.amax(0) / half)[:3]
    assert torch.allclose(both[0] / both[1], (both[0] / both[1])[0].expand(3)), "the difficulty is shared"
    assert half[3] == 1, "nothing is known of a channel that is always zero"
    assert half[:3].log().mean().abs() < 1e-6
