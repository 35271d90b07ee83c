"""What flows into and out of every block, for all calibration records: once in float, once through what is quantized so far.

A block that is done is never run again: while the inputs of the next one are captured, it replays what it returned.
Each stream therefore costs one pass through the model altogether, however many blocks there are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.calib.record import MEMORY
from stepquant.core.mapped import on_disk
from stepquant.errors import CalibrationError, MethodError
from stepquant.fit.shape import PROBES, Shape, shape_of
from stepquant.quant.insert import Inserted


class Reached(Exception):  # noqa: N818 - it ends a forward pass early, it is no error
    """The block whose inputs are wanted has been called."""


@dataclass(frozen=True)
class Table:
    """Arguments or results of one block for all records: one column per tensor."""

    shape: Shape
    columns: tuple[Tensor, ...]
    device: torch.device  # where the block is; the columns are on the CPU, whose memory is larger
    memory: int = 0  # bytes of the budget that the columns take
    mapped: bool = False  # some of them are on disk

    @property
    def rows(self) -> int | None:
        """None where nothing in it has any."""
        return len(self.columns[0]) if self.columns else None

    def take(self, rows: Tensor | slice) -> list[Tensor]:
        return [column[rows].to(self.device) for column in self.columns]

    def touch(self, rows: Tensor) -> None:
        """Read these rows, so that they are in the cache of the system when they are taken."""
        for column in self.columns:
            column.index_select(0, rows)


@dataclass(frozen=True)
class Piece:
    """A block, or a layer outside all blocks, that is reconstructed as one."""

    path: str
    module: nn.Module
    arguments: Shape
    results: Shape
    members: tuple[str, ...] = ()  # the layers it is made of, where they do not lie below its path

    @property
    def covers(self) -> tuple[str, ...]:
        return self.members or (self.path,)

    def run(self, columns: Sequence[Tensor]) -> Any:
        """Call the module with rows of its arguments."""
        bound = inspect.signature(type(self.module).forward).bind_partial()
        bound.arguments.update({"self": self.module} | self.arguments.join(columns))
        return self.module(*bound.args[1:], **bound.kwargs)

    def outputs(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """The tensors it returns for rows of its arguments."""
        return self.results.split(self.run(columns))


class Streams:
    """Inputs and outputs of the pieces of `network`, in memory up to `budget` bytes and beyond that in mapped files."""

    def __init__(
        self, network: Inserted, data: CalibSet, folder: Path, *, batch: int = 32, budget: int = MEMORY
    ) -> None:
        if len(data) < PROBES[-1]:
            raise CalibrationError(
                "too few calibration records", got=len(data), expected=f"at least {PROBES[-1]}"
            )
        self.network, self.data, self.batch, self.left = network, data, batch, budget
        self.records = len(data)
        self.arguments = [records.arguments for records in data.batches(batch)]
        if network.clock is not None:
            network.clock.times = torch.cat([one[data.t] for one in self.arguments])
        self.folder = folder
        network.switch(weights=False, inputs=False)
        self.pieces = find_pieces(network, [data.take(range(size)).arguments for size in PROBES])
        self.done: dict[bool, dict[str, Table]] = {False: {}, True: {}}

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done = {False: {}, True: {}}

    def slices(self, rows: int | None = None) -> Iterator[slice]:
        """All records in batches; or so many rows of a table that has other ones."""
        total = self.records if rows is None else rows
        for start in range(0, total, self.batch):
            yield slice(start, min(start + self.batch, total))

    def inputs(self, piece: Piece, *, quantized: bool) -> Table:
        """The arguments that reach `piece` behind finished pieces."""
        place: list[slice] = [slice(0)]
        caught: list[Any] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            caught.append(arguments_of(piece.module, args, kwargs))
            raise Reached

        table = Allocation(self, piece.arguments)
        with ExitStack() as patches:
            for path, outputs in self.done[quantized].items():
                if path == piece.path:
                    break
                patches.enter_context(replaced(self.module(path), replay(outputs, place)))
            patches.enter_context(replaced(piece.module, catch))
            for rows, arguments in zip(self.slices(), self.arguments):
                place[0] = rows
                try:
                    with torch.no_grad():
                        self.network.denoiser.predict(arguments)
                except Reached:
                    table.put(rows, piece.arguments.split(caught.pop()))
        return table.table()

    def advance(self, piece: Piece, inputs: Table, *, quantized: bool) -> Table:
        """Run `piece`, as it is switched now, over all records; from here on it replays the results."""
        table = Allocation(self, piece.results)
        with torch.no_grad():
            for rows in self.slices():
                self.network.at(rows)
                table.put(rows, piece.outputs(inputs.take(rows)))
        self.done[quantized][piece.path] = table.table()
        return self.done[quantized][piece.path]

    def restart(self) -> None:
        """Begin the quantized stream anew, at the first piece."""
        for table in self.done[True].values():
            self.release(table)
        self.done[True] = {}

    def release(self, table: Table) -> None:
        """Give back the memory that a table in memory had taken from the budget."""
        self.left += table.memory

    def module(self, path: str) -> nn.Module:
        return self.network.denoiser.model.get_submodule(path)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        needed = torch.Size(shape).numel() * dtype.itemsize
        if needed <= self.left:
            self.left -= needed
            return torch.empty(shape, dtype=dtype)
        return on_disk(shape, dtype, self.folder)


class Allocation:
    """A table that is filled batch by batch."""

    def __init__(self, streams: Streams, shape: Shape, rows: int | None = None) -> None:
        self.streams, self.shape, self.before = streams, shape, streams.left
        self.rows = streams.records if rows is None else rows
        self.columns: tuple[Tensor, ...] = ()

    def put(self, rows: slice, tensors: Sequence[Tensor]) -> None:
        if not self.columns:
            sizes = [(self.rows, *tensor.shape[1:]) for tensor in tensors]
            self.columns = tuple(self.streams.allocate(size, t.dtype) for size, t in zip(sizes, tensors))
        for column, tensor in zip(self.columns, tensors, strict=True):
            column[rows] = tensor.detach()

    def table(self) -> Table:
        device, memory = self.streams.network.denoiser.device, self.before - self.streams.left
        mapped = memory < sum(column.nbytes for column in self.columns)
        return Table(self.shape, self.columns, device, memory, mapped)


def replay(outputs: Table, place: Sequence[slice]) -> Callable[..., Any]:
    """A forward that returns what was returned before; copies, because a caller may add to them in place."""

    def forward(*_: Any, **__: Any) -> Any:
        return outputs.shape.join([column.clone() for column in outputs.take(place[0])])

    return forward


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call `forward` instead of the module's own."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def arguments_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, whether they came by position or by keyword."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return {name: value for name, value in bound.arguments.items() if name != "self"}


def find_pieces(network: Inserted, probes: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """Blocks, and quantized layers outside them, in the order in which they are called."""
    blocks = network.denoiser.blocks()
    outside = [path for path in network.layers if not any(path.startswith(f"{block}.") for block in blocks)]
    modules = {path: network.denoiser.model.get_submodule(path) for path in (*blocks, *outside)}
    seen = [watch(network, modules, probe) for probe in probes]
    lost = [path for path in modules if path not in seen[0]]
    if lost:
        raise MethodError(f"'{lost[0]}' is not called by the model", fix="keep it in float with a plan rule")
    return [piece_of(path, modules[path], trees, seen[1][path]) for path, trees in seen[0].items()]


def piece_of(path: str, module: nn.Module, trees: Sequence[Any], others: Sequence[Any]) -> Piece:
    """What two passes of different batch size show of a module: which arguments and results have rows of records."""
    arguments, results = (shape_of(tree, other, path) for tree, other in zip(trees, others))
    return Piece(path, module, arguments, results)


def watch(
    network: Inserted, modules: Mapping[str, nn.Module], arguments: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Path -> [arguments, results] of one forward pass, in the order of the calls."""
    seen: dict[str, list[Any]] = {}

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if path in seen:
            raise MethodError(
                f"'{path}' is called twice in one forward pass", expected="blocks that run once"
            )
        seen[path] = [arguments_of(module, args, kwargs)]

    with ExitStack() as hooks:
        for path, module in modules.items():
            first = module.register_forward_pre_hook(
                lambda m, a, k, path=path: before(path, m, a, k), with_kwargs=True
            )
            last = module.register_forward_hook(lambda m, a, out, path=path: seen[path].append(out))
            hooks.callback(first.remove)
            hooks.callback(last.remove)
        with torch.no_grad():
            network.denoiser.predict(arguments)
    return seen
