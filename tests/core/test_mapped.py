"""Tensors on disk: the same numbers, in files that are gone with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stepquant.core.mapped import MappedParameter, alike, beside, copied, mapping, on_disk, view
from stepquant.errors import StepquantError


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.bool])
def test_numbers_are_the_same_in_a_file_without_a_name(kind: torch.dtype, tmp_path: Path) -> None:
    value = torch.arange(6).reshape(2, 3).to(kind)
    assert torch.equal(copied(value, tmp_path / "made"), value)
    assert list((tmp_path / "made").iterdir()) == []
    assert copied(value[:0], tmp_path).shape == (0, 3)


def test_what_takes_the_place_of_a_weight_lies_where_it_does(tmp_path: Path) -> None:
    usual = nn.Parameter(torch.zeros(2))
    filed = MappedParameter.of(copied(torch.zeros(2), tmp_path), tmp_path, like=usual)
    value = torch.ones(3)
    assert beside(usual, value) is value
    assert type(alike(usual, value)) is nn.Parameter
    made = alike(filed, value)
    assert isinstance(made, MappedParameter)
    assert made.requires_grad
    assert torch.equal(alike(made, value), beside(made, value))


def test_a_file_is_read_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(b"\0" * 4 + bytes(torch.tensor([1.0, -2.0]).numpy()))
    assert view(mapping(file), torch.float32, (2, 1), 4).flatten().tolist() == [1.0, -2.0]
    assert view(mapping(file), torch.float32, (0, 3), 4).shape == (0, 3), "as layers of no channels have"


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StepquantError, match="cannot write"):
        on_disk((2,), torch.float32, tmp_path / "file")
