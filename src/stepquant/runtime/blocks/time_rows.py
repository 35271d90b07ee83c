"""A cache of what depends on t alone: the time embedding, and the row that each residual block projects it to."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.artifact import StepSpec
from stepquant.models.split import find
from stepquant.runtime.adapters.present import adapters_in, settings_of
from stepquant.runtime.blocks.swallowed import Swallowed
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.offloaded import around, on_disk
from stepquant.runtime.layers.stored import Versions
from stepquant.runtime.layers.tabled import Tabled
from stepquant.runtime.steps import StepTensors

KEPT_TIMES = 1024


class Row(NamedTuple):
    """What one t becomes, each with a batch of one."""

    projection: Tensor
    embedding: Tensor
    blocks: tuple[Tensor, ...]


class Current(NamedTuple):
    """The tensors that were handed to the model for its present batch, recognised by identity."""

    projection: Tensor
    embedding: Tensor
    blocks: tuple[Tensor, ...]


class TimeRows:
    """Takes the place of the forwards of a time projection and of the embedding behind it.

    A row is found by the exact bits of t. A tensor that is not the very one handed out here (another t for each
    sample, a class embedding added, a condition) is computed as ever, so that nothing else can be mistaken for it.
    """

    def __init__(
        self, root: nn.Module, projection: nn.Module, embedding: nn.Module, blocks: Sequence[nn.Module]
    ) -> None:
        """`root` is the model that they are parts of."""
        self.projection, self.embedding, self.blocks = projection, embedding, list(blocks)
        # Functions, not methods: where torch.compile breaks a graph it looks methods up again, and finds those of this class.
        self.own_project, self.own_embed = type(projection).forward, type(embedding).forward
        self.layers = [
            layer
            for module in (embedding, *blocks)
            for layer in module.modules()
            if isinstance(layer, IntegerLayer)
        ]
        self.adapters = adapters_in(embedding, *blocks)
        self.around = around(root, [embedding, *blocks])
        self.swallowed = Swallowed(*embedding.children(), *blocks, within=embedding)
        self.rows: OrderedDict[tuple[Any, ...], Row] = OrderedDict()
        self.made_by: list[object] = []  # what the layers had prepared when the rows were made
        self.current: Current | None = None

    def project(self, timesteps: Tensor) -> Tensor:
        row = self.row_of(timesteps)
        if row is None:
            self.current = None
            return self.own_project(self.projection, timesteps)
        batch = len(timesteps)
        self.current = Current(row.projection.expand(batch, -1), row.embedding.expand(batch, -1), row.blocks)
        return self.current.projection

    def embed(self, projected: Tensor, condition: Tensor | None = None) -> Tensor:
        current = self.current
        if current is not None and projected is current.projection and condition is None:
            return current.embedding
        return self.own_embed(self.embedding, projected, condition)

    def block(self, index: int, embedding: Tensor) -> Tensor | None:
        """What block `index` adds for this embedding, if it is the one handed out for the present batch."""
        current = self.current
        return current.blocks[index] if current is not None and embedding is current.embedding else None

    def row_of(self, timesteps: Tensor, unchanged: bool = False) -> Row | None:
        """The row of the one t of this batch, if there is one; `unchanged`: what it is made by is known to be."""
        if timesteps.dim() != 1 or not timesteps.is_cpu or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        if not unchanged:
            if self.swallowed.awaited() or self.swallowed.learns():
                return None
            if any(on_disk(vars(one)) for one in self.around):
                return None
            self.renew()
        values = timesteps.tolist()
        if values.count(values[0]) != len(values) if values else True:
            return None
        key = (timesteps.dtype, values[0])
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = self.make_row(timesteps[:1])
            if len(self.rows) > KEPT_TIMES:
                self.rows.popitem(last=False)
        return row

    def renew(self) -> None:
        """Drop all rows if something that they were made by is another thing by now."""
        made_by = self.makers()
        if made_by != self.made_by:
            self.rows.clear()
            self.made_by = made_by

    def makers(self) -> list[object]:
        """What the rows follow from: equal only while it is the same."""
        floats = (value for module in (self.embedding, *self.blocks) for value in module.parameters())
        made = [layer.prepared() for layer in self.layers]
        return [Versions.of(floats), *made, *settings_of(self.adapters)]

    def make_row(self, t: Tensor) -> Row:
        with torch.inference_mode(False), torch.no_grad():
            projection = self.own_project(self.projection, t.clone())
            embedding = self.own_embed(self.embedding, projection)
            activated = F.silu(embedding)
            return Row(projection, embedding, tuple(block(activated).float() for block in self.blocks))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"rows": OrderedDict(), "current": None}


class TimeTable(TimeRows):
    """Rows that were stored: nothing behind the time projection is computed, and no other t has a row."""

    def __init__(
        self,
        root: nn.Module,
        projection: nn.Module,
        embedding: nn.Module,
        blocks: Sequence[nn.Module],
        tensors: StepTensors,
        widths: Sequence[int],
    ) -> None:
        super().__init__(root, projection, embedding, blocks)
        self.tensors, self.widths = tensors, list(widths)  # of the columns that each block reads

    def makers(self) -> list[object]:
        return [self.tensors.prepared()]

    def make_row(self, t: Tensor) -> Row:
        return Row(*self.looked_up(t))

    def looked_up(self, t: Tensor) -> Current:
        """The rows of every t; the time projection passes t on, because nothing reads more of it."""
        stored = self.tensors.prepared()
        assert stored.table is not None, "only a table makes these rows"
        places, columns = stored.times.places(t), stored.table.split(self.widths, 1)
        marks = t.to(stored.table.dtype).reshape(-1, 1)
        return Current(marks, marks.clone(), tuple(column[places] for column in columns))

    def project(self, timesteps: Tensor) -> Tensor:
        if self.row_of(timesteps) is not None:
            return super().project(timesteps)
        self.current = self.looked_up(timesteps)
        return self.current.projection

    def embed(self, projected: Tensor, condition: Tensor | None = None) -> Tensor:
        assert self.current is not None, "the projection runs before the embedding"
        return self.current.embedding

    def block(self, index: int, embedding: Tensor) -> Tensor | None:
        assert self.current is not None, "the projection runs before the blocks"
        return self.current.blocks[index]


class TableColumn:
    """Stands in for the forward of one layer that a table has the outputs of."""

    goes_along = True  # with those who run the layer and with those who do not

    def __init__(self, times: TimeRows, index: int) -> None:
        self.times, self.index = times, index

    def __call__(self, embedding: Tensor) -> Tensor | None:
        return self.times.block(self.index, embedding)


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

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        input: Tensor = inputs[0] if inputs else named["input"]
        dtype = input.dtype if self.in_floats or self.emit is None else self.emit
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
