import pytest
import torch

from stepquant.core.grid import Grid
from stepquant.core.steps import StepCorrection, StepTable


def test_rows_follow_the_exact_bits_of_t() -> None:
    times = torch.tensor([980.0, 490.5, 490.50000000001, 0.1], dtype=torch.float64)
    table = StepTable.of(times)
    assert table.rows_of(times.flip(0)).tolist() == [3, 2, 1, 0]
    # 0.1 in single precision is another number, and so is a neighbour by one bit.
    near = torch.nextafter(times[1], times[0])
    assert table.rows_of(torch.tensor([0.1]).float()).tolist() == [-1]
    assert table.rows_of(near).tolist() == [-1]


def test_whole_numbers_are_found_in_every_dtype() -> None:
    table = StepTable.of(torch.tensor([999, 500, 0]))
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        assert table.rows_of(torch.tensor([0, 999, 500]).to(dtype)).tolist() == [2, 0, 1]
    assert table.rows_of(torch.tensor(500)).tolist() == [1]


@pytest.mark.parametrize("steps, groups", [(100, 20), (10, 3), (7, 7), (3, 5), (50, 1)])
def test_groups_are_neighbours_of_about_equal_size(steps: int, groups: int) -> None:
    table = StepTable.of(torch.arange(steps).flip(0), groups)
    sizes = torch.bincount(table.rows)
    assert table.groups == min(groups, steps) == len(sizes)
    assert (table.rows.diff() >= 0).all()
    assert sizes.max() - sizes.min() <= 1


def test_a_repeated_t_reads_one_row() -> None:
    table = StepTable.of(torch.tensor([900.0, 600.0, 600.0, 300.0]))
    assert table.times.tolist() == [900.0, 600.0, 300.0]
    assert table.rows.tolist() == [0, 1, 2]


def test_bits_survive_the_disk() -> None:
    table = StepTable.of(torch.tensor([1 / 3, 2e-300, 7.0], dtype=torch.float64), 2)
    again = StepTable.from_bits(table.to_bits(), table.rows.int())
    assert torch.equal(again.times, table.times)
    assert torch.equal(again.rows, table.rows)


def test_a_correction_is_affine_by_step_and_channel() -> None:
    scale, bias = torch.tensor([[1.0, 2.0], [0.5, 4.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    x = torch.ones(3, 2, 2, 2)
    out = StepCorrection(scale, bias, torch.zeros(2, 2))(x, torch.tensor([1, 0, 1]))
    assert out[:, :, 0, 0].tolist() == [[-0.5, 4.0], [1.0, 3.0], [-0.5, 4.0]]
    assert StepCorrection(scale, bias, bias)(x.bfloat16(), torch.tensor([0, 0, 0])).dtype == torch.bfloat16


def test_the_grid_says_that_it_has_a_scale_per_step() -> None:
    grid = Grid.parse("uint8/step")
    assert (grid.granularity, str(grid)) == ("step", "uint8/step")


def test_two_corrections_become_one() -> None:
    first, second = (StepCorrection(*torch.rand(3, 2, 3).unbind(), "absorb") for _ in range(2))
    x, places = torch.randn(4, 3, 2, 2), torch.tensor([1, 0, 0, 1])
    both = second.behind(first.scale, first.bias)
    torch.testing.assert_close(both(x, places), second(first(x, places), places))
    assert (both.noise, both.variance is second.variance) == ("absorb", True)
