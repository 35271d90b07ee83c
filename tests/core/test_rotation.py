"""Rotation by regular Hadamard matrices, against the matrices themselves."""

from __future__ import annotations

import pytest
import torch

from stepquant.core.rotation import group_of, is_group, rotate

H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)


def hadamard(size: int) -> torch.Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.kron(made, H4)
    return made / size**0.5


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_it_is_the_product_with_the_matrix(group: int) -> None:
    torch.manual_seed(0)
    matrix = hadamard(group)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(group, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(3, 5, 2 * group)
    want = (x.double().unflatten(-1, (2, group)) @ matrix).flatten(-2)
    torch.testing.assert_close(rotate(x, group).double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(rotate(x, group), group), x, rtol=0, atol=1e-5)


def test_no_column_is_of_ones_so_that_a_mean_stays_as_small_as_it_is() -> None:
    assert rotate(torch.ones(1, 256), 256).abs().amax() == 1


def test_products_of_rotated_rows_are_those_of_rows() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 64), torch.randn(5, 64)
    torch.testing.assert_close(rotate(x, 16) @ rotate(weight, 16).T, x @ weight.T, rtol=0, atol=1e-5)


def test_groups_are_powers_of_four() -> None:
    assert [n for n in range(-4, 1100) if is_group(n)] == [4, 16, 64, 256, 1024]


def test_the_largest_group_that_divides_and_is_allowed() -> None:
    groups = [n for n in range(2, 300) if is_group(n)]
    for width in (1, 6, 8, 48, 128, 192, 768, 1152):
        for most in (0, 4, 16, 64, 100, 256):
            fits = [group for group in groups if group <= most and width % group == 0]
            assert group_of(width, most) == max(fits, default=0)
