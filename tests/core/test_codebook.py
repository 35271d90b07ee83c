from __future__ import annotations

from itertools import combinations, combinations_with_replacement

import pytest
import torch
from torch import Tensor

from stepquant.core.codebook import (
    ThroughCodebook,
    best_bytes,
    by_mass,
    codebook_of,
    codes_of,
    enclosing,
    evenly,
    lloyd_max,
    nearest,
    tables_of,
)

# Max 1960, table 1: the least mean square error of normal numbers of variance one.
LEAST = {4: 0.1175, 8: 0.03454, 16: 0.009497}


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def least_error(row: list[float], count: int) -> float:
    """Of all ways to cut the numbers, in order, into so many cells around their means."""
    ordered = torch.tensor(sorted(row), dtype=torch.float64)
    cuts = combinations(range(1, len(row)), count - 1)
    parts = [torch.tensor_split(ordered, list(cut)) for cut in cuts]
    return min(sum(float((cell - cell.mean()).square().sum()) for cell in cells) for cells in parts)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_hardly_worse_than_the_best_of_all_cuts(count: int) -> None:
    rows = rows_of(40, 9)
    scale, levels = codebook_of(rows, count)
    found = (rows - nearest(rows / scale[:, None], levels) * scale[:, None]).square().sum(1)
    best = torch.tensor([least_error(row, count) for row in rows.tolist()])
    # Integers of a byte move every number by half a step of a 127th at most.
    assert (found.sqrt() >= best.sqrt() - 3 * scale).all()
    assert float(found.sum() / best.sum()) < 1.1


@pytest.mark.parametrize("count", LEAST)
def test_normal_numbers_lose_what_max_found(count: int) -> None:
    rows = rows_of(4, 20000)
    scale, levels = codebook_of(rows, count)
    error = (rows - nearest(rows / scale[:, None], levels) * scale[:, None]).square().mean()
    assert float(error) == pytest.approx(LEAST[count], rel=0.03)


def test_where_it_ends_every_level_is_the_mean_of_its_numbers() -> None:
    rows = rows_of(3, 500, seed=1)
    levels = lloyd_max(rows, by_mass(rows, 8))
    cells = codes_of(rows, levels)
    for row, own, mine in zip(rows, cells, levels):
        means = torch.stack([row[own == cell].mean() for cell in range(8)])
        torch.testing.assert_close(mine, means, rtol=1e-4, atol=1e-4)


def test_codes_name_the_nearest_of_all_levels_and_neighbours_hold_a_number_between_them() -> None:
    levels = torch.tensor([[-127.0, -3.0, 5.0, 90.0], [0.0, 0.0, 1.0, 127.0]])
    rows = rows_of(2, 300) * 100
    want = (rows[..., None] - levels[:, None]).abs().argmin(-1)
    assert torch.equal(nearest(rows, levels), levels.gather(1, want))
    lower, upper, share = enclosing(rows, levels)
    inside = (rows >= levels[:, :1]) & (rows <= levels[:, -1:])
    torch.testing.assert_close((lower + share * (upper - lower))[inside], rows[inside])
    assert torch.equal(lower[~inside], upper[~inside])
    assert torch.equal(torch.where(share > 0.5, upper, lower)[share != 0.5], nearest(rows, levels)[share != 0.5])  # fmt: skip


def test_rows_without_a_difference_are_held_exactly() -> None:
    rows = torch.tensor([[0.0] * 6, [0.25] * 6])
    scale, levels = codebook_of(rows, 4)
    torch.testing.assert_close(nearest(rows / scale[:, None], levels) * scale[:, None], rows)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_a_histogram_are_the_best_of_all(count: int, seed: int) -> None:
    counts = torch.randint(0, 50, (11,), generator=torch.Generator().manual_seed(seed)) * (rows_of(11, seed=seed) > -0.5)  # fmt: skip
    every = torch.arange(11.0)

    def error(levels: Tensor) -> float:
        return float((counts * (every - nearest(every[None], levels[None])[0]).square()).sum())

    for zero_point in (0, 4, 10):
        found = best_bytes(counts, count, zero_point)
        assert (found.diff() >= 0).all()
        assert zero_point in found
        every_choice = combinations_with_replacement(range(11), count)
        tried = (torch.tensor(some).float() for some in every_choice if zero_point in some)
        assert error(found) == min(map(error, tried))


def test_bytes_of_nothing_and_of_fewer_than_there_is_room_for() -> None:
    counts = torch.zeros(256)
    assert best_bytes(counts, 4, 9).tolist() == [9] * 4
    counts[[7, 200]] = 3
    assert set(best_bytes(counts, 4, 9).tolist()) == {7, 9, 200}


def test_bytes_are_moved_to_the_nearest() -> None:
    assert evenly(4, 90).tolist() == [0, 90, 170, 255]
    assert evenly(256, 90).tolist() == list(range(256))
    tables = tables_of(torch.tensor([[0.0, 3.0, 255.0], [7.0, 7.0, 9.0]]))
    assert tables.shape == (2, 256)
    assert tables[0, [0, 1, 2, 3, 129, 130]].tolist() == [0, 0, 3, 3, 3, 255]
    assert tables[1, [0, 8, 9, 255]].tolist() == [7, 7, 9, 9]


def test_gradients_pass_to_numbers_inside_and_to_scales() -> None:
    levels, x = torch.tensor([[-100.0, 0.0, 120.0]]), torch.tensor([[-3.0, -0.2, 0.9, 5.0]], requires_grad=True)  # fmt: skip
    scale = torch.tensor([[0.02]], requires_grad=True)
    out = ThroughCodebook.apply(x, scale, levels)  # type: ignore[no-untyped-call]
    assert out.tolist() == [pytest.approx([-2.0, 0.0, 0.0, 2.4])]
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (out * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 2.0, 3.0, 0.0]]
    # Learned step sizes: the level less the number where it is inside, the level where it is not.
    want = 1 * -100 + 2 * (0 + 10) + 3 * (0 - 45) + 4 * 120
    assert float(scale.grad) == pytest.approx(want)  # type: ignore[arg-type]
