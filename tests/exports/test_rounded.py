"""Inputs whose bits differ by step are clipped, in a graph, to those of the step; codes are moved to those of a codebook."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.hub.exports import qdq
from stepquant.runtime.ops.code import Code


def test_a_step_of_fewer_bits_is_clipped_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}

    def node(name: str, inputs: list[Tensor], *_: object) -> Tensor:
        seen[name] = inputs[0]
        return inputs[0].clamp(*inputs[1:]) if name == "Clip" else inputs[0]

    monkeypatch.setattr(qdq, "node", node)
    place, x = qdq.Place(), torch.tensor([-9.0, 2.0, 500.0])
    rounded = qdq.Rounded((Code(0.5, 2, 0, 7), Code(0.5, 0, 0, 255)), place)
    for row, want in ((0, [-1.0, 2.0, 2.5]), (1, [0.0, 2.0, 127.5])):
        place.row = torch.tensor(row)
        rounded(x)
        assert seen["QuantizeLinear"].tolist() == want
    alike = qdq.Rounded((Code(0.5, 0, 0, 7),) * 2, place)
    alike(x)
    assert seen["QuantizeLinear"].tolist() == [0.0, 2.0, 3.5]
    assert not any(name in dict(alike.named_buffers()) for name in ("low", "high"))


def test_codes_are_moved_by_the_table_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, inputs: list[Tensor], *_: object) -> Tensor:
        x, scale, zero_point = inputs
        return (x / scale).round().add(zero_point).clamp(0, 255).to(torch.uint8)

    monkeypatch.setattr(qdq, "node", node)
    place, tables = qdq.Place(), [torch.arange(256).flip(0).byte(), torch.full((256,), 9).byte()]
    rounded = qdq.Rounded((Code(0.5, 2, 0, 255),) * 2, place, tables)
    place.row = torch.tensor(0)
    assert rounded.codes(torch.tensor([0.0, 1.0, 500.0]))[0].tolist() == [253, 251, 0]
    place.row = torch.tensor(1)
    assert rounded.codes(torch.tensor([0.0, 1.0, 500.0]))[0].tolist() == [9, 9, 9]
