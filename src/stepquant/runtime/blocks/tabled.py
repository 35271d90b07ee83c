"""Layers whose output for every t is in a table, in models whose t enters in a way of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stepquant.artifact import StepSpec
from stepquant.models.split import find
from stepquant.runtime.blocks.time_rows import Tabled
from stepquant.runtime.steps import StepTensors


class TabledLayer(Tabled):
    """Returns its part of the rows that were found for the running call; without a part, anything of the right size."""

    def __init__(self, tensors: StepTensors, start: int, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.source = (tensors,)  # in a tuple: it belongs to the model
        self.start, self.shape, self.width = start, shape, width
        self.emit: torch.dtype | None = None

    @property
    def weight(self) -> Tensor:
        """Some models ask a layer for the dtype of its weight."""
        return torch.empty(0)

    def forward(self, input: Tensor, *_: object, **__: object) -> Tensor:
        dtype = self.emit or input.dtype
        if not self.shape:
            return input.new_zeros((), dtype=dtype).expand(*input.shape[:-1], self.width)
        rows = self.source[0].present
        assert rows is not None, "a tabled layer runs inside a call of the whole model"
        part = rows.narrow(1, self.start, math.prod(self.shape))
        return part.unflatten(1, self.shape).to(dtype)


def put_tabled(model: nn.Module, spec: StepSpec, tensors: StepTensors) -> None:
    """Layers that read the table in the places of those that it stands in for."""
    for path, start in starts(spec):
        width = int(find(model, path).out_features)  # type: ignore[arg-type]
        model.set_submodule(path, TabledLayer(tensors, start, spec.tabled[path], width))


def starts(spec: StepSpec) -> Iterator[tuple[str, int]]:
    """Every tabled layer with the first of its columns."""
    start = 0
    for path, shape in sorted(spec.tabled.items()):
        yield path, start
        start += math.prod(shape) if shape else 0
