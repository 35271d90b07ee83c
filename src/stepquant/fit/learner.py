"""Learner: everything that is learnt in one block, and the losses that it is learnt by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from stepquant.core.losses import BlockLoss, Outputs
from stepquant.core.precision import multiplies_bf16
from stepquant.fit.learnable import LearnedScale, LearnedWeight, SoftRounding, draw, kept
from stepquant.fit.shape import fold
from stepquant.fit.streams import Piece, Table
from stepquant.models.split import SplitLayer
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on what a block is reconstructed; a rate of 0 leaves that part alone."""

    iterations: int
    batch: int = 32
    rounding_rate: float = 1e-3
    scale_rate: float = 0.0
    weight_rate: float = 0.0  # of weights that are learnt through their rounding, in units of their scales
    rank: int = 0  # of the two matrices that are learnt in place of such a weight; 0: itself is
    weight_scale_rate: float = 0.0  # of the scales of those weights
    last: float = 0.0  # share of the rates that is left at the end of the cosine
    penalty: float = 0.01  # weight of the rounding regulariser; 0 switches it off
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2  # share of the iterations before the regulariser sets in
    mix: float = 1.0  # probability that an input element is the quantized one
    keep: float = 1.0  # probability that an activation element is quantized
    loss: BlockLoss = field(default_factory=BlockLoss)
    checks: int = 10  # looks at the held-out records
    patience: int = 4  # checks without improvement before it ends
    gap: float = (
        0.0  # by how much of the hard loss the soft one may differ for roundings to be decided; 0: never
    )
    by_size: float = (
        0.0  # exponent of how many more iterations a block of fewer weights gets; 0: all the same
    )
    without: tuple[str, ...] = ()  # roles whose layers stay as they are
    only: tuple[str, ...] = ()  # roles whose layers are learnt; none: all
    watch: tuple[str, ...] = ()  # roles whose layers count in the loss; none: all
    bf16: bool = False  # multiply in bfloat16 while learning, where the processor can


@dataclass(frozen=True)
class Sample:
    """What one piece receives and should return: float inputs, quantized inputs and float targets by record."""

    floats: Table
    quants: Table
    targets: Table
    train: Tensor  # record numbers
    held: Tensor
    weights: Tensor | None = None  # one per record, mean 1
    layers: Table | None = None  # float outputs of the layers that count in the loss

    @property
    def mapped(self) -> list[Table]:
        """What is on disk of the tables that learning reads."""
        tables = (self.quants, self.targets, self.floats, self.layers)
        return [table for table in tables if table is not None and table.mapped]

    def weighted(self, weights: Tensor) -> Sample:
        return replace(self, weights=weights)


class Learner:
    """The roundings and scales of one piece while they are learnt."""

    def __init__(self, network: Inserted, piece: Piece, schedule: Schedule, generator: Generator) -> None:
        self.network, self.piece, self.schedule, self.generator = network, piece, schedule, generator
        self.layers = {
            path: layer
            for path, layer in inside(network.layers, *piece.covers).items()
            if layer.role not in schedule.without and (not schedule.only or layer.role in schedule.only)
        }
        self.roundings: dict[str, SoftRounding] = {}
        if schedule.rounding_rate:
            for path, layer in self.layers.items():
                if layer.weight_quantizer is not None:
                    self.roundings[path] = SoftRounding(layer.weight, layer.weight_quantizer)
        self.weights: dict[str, LearnedWeight] = {}
        if schedule.weight_rate:
            for path, layer in self.layers.items():
                if layer.weight_quantizer is not None:
                    self.weights[path] = LearnedWeight(layer, schedule.rank, generator)
                    self.weights[path].factor.requires_grad_(schedule.weight_scale_rate > 0)
        self.former = {path: self.layers[path].rounding for path in (*self.roundings, *self.weights)}
        self.scales: dict[Quantizer, LearnedScale] = {}
        for quantizer in activation_quantizers(network, *piece.covers):
            if quantizer.enabled:
                self.scales[quantizer] = LearnedScale(quantizer, schedule.keep, generator)
        self.watched = watched_layers(piece, schedule.watch) if schedule.loss.layers else []

    def attach(self) -> None:
        for path, rounding in (self.roundings | self.weights).items():
            self.layers[path].rounding = rounding
        for quantizer, learnt in self.scales.items():
            quantizer.stand_in = learnt

    def detach(self) -> None:
        """Back to rounding as it was before, and to scales as they were set."""
        for path, rounding in self.former.items():
            self.layers[path].rounding = rounding
        for quantizer in self.scales:
            quantizer.stand_in = None

    def settle(self) -> None:
        """Make what was learnt permanent: weights round up or down, scales are set."""
        self.detach()
        for path, rounding in self.roundings.items():
            self.layers[path].rounding = kept(rounding.fixed(), self.layers[path])
        for path, weight in self.weights.items():
            weight.settle(self.layers[path])
        if self.schedule.scale_rate:
            for quantizer, learnt in self.scales.items():
                quantizer.set_range(learnt.scale, learnt.zero_point)

    def parameters(self) -> list[dict[str, object]]:
        groups: list[dict[str, object]] = []
        if self.roundings:
            groups.append(
                {"params": [r.alpha for r in self.roundings.values()], "lr": self.schedule.rounding_rate}
            )
        if self.scales and self.schedule.scale_rate:
            groups.append(
                {"params": [s.factor for s in self.scales.values()], "lr": self.schedule.scale_rate}
            )
        for weight in self.weights.values():
            rates = [
                self.schedule.weight_rate * (weight.typical if self.schedule.rank else 1.0),
                self.schedule.weight_rate,
            ]
            groups += [{"params": [one], "lr": rate} for one, rate in zip(weight.changes, rates)]
        if self.weights and self.schedule.weight_scale_rate:
            groups.append(
                {"params": [w.factor for w in self.weights.values()], "lr": self.schedule.weight_scale_rate}
            )
        return groups

    def learnt(self) -> list[Tensor]:
        """All that is."""
        tensors = [r.alpha for r in self.roundings.values()] + [s.factor for s in self.scales.values()]
        for weight in self.weights.values():
            tensors += [*weight.changes, weight.factor]
        return tensors

    def state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.learnt()]

    def restore(self, state: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.learnt(), state, strict=True):
                tensor.copy_(value)

    @contextmanager
    def evaluating(self, *, hard: bool) -> Iterator[None]:
        """Without random dropping, and with weights on integers if `hard`."""
        for rounding in self.roundings.values():
            rounding.hard = hard
        for learnt in self.scales.values():
            learnt.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for rounding in self.roundings.values():
                rounding.hard = False
            for learnt in self.scales.values():
                learnt.training = True

    def outputs(self, columns: Sequence[Tensor]) -> Outputs:
        """What the piece returns as it is switched now, and its layers with it."""
        return watch_layers(self.piece, self.watched, columns)

    def target(self, sample: Sample, rows: Tensor) -> Outputs:
        """What the float piece, and the layers in it that count, return."""
        block = sample.targets.take(rows)
        return Outputs(block, sample.layers.take(rows)) if sample.layers is not None else Outputs(block)

    def mixed(self, sample: Sample, rows: Tensor) -> list[Tensor]:
        """Quantized inputs, of which the first is mixed with the float one."""
        columns = sample.quants.take(rows)
        if self.schedule.mix < 1:
            quantized = draw(columns[0].shape, self.schedule.mix, self.generator)
            floats = sample.floats.columns[0][rows].to(columns[0].device)
            columns[0] = torch.where(quantized.to(floats.device), columns[0], floats)
        return columns

    def multiplying(self, like: Tensor) -> AbstractContextManager[object]:
        """Products in bfloat16 if that is wanted, and saves time, and the model itself is in float32."""
        wanted = self.schedule.bf16 and like.dtype == torch.float32 and multiplies_bf16(like.device)
        return torch.autocast(like.device.type, torch.bfloat16) if wanted else nullcontext()

    def loss(self, sample: Sample, rows: Tensor) -> Tensor:
        target = self.target(sample, rows)
        weights = None if sample.weights is None else sample.weights[rows].to(target.block[0].device)
        self.network.at(rows)
        with self.multiplying(target.block[0]):
            out = self.outputs(self.mixed(sample, rows))
        return self.schedule.loss(out, target, weights)

    def held_loss(self, sample: Sample) -> float:
        """The block's own error, unweighted, on held-out records with quantized inputs."""
        total, measure = 0.0, replace(self.schedule.loss, layers=0.0)
        for rows in sample.held.split(self.schedule.batch):
            self.network.at(rows)
            out = Outputs(self.piece.outputs(sample.quants.take(rows)))
            total += float(measure(out, Outputs(sample.targets.take(rows)))) * len(rows)
        return total / len(sample.held)


def inside(modules: Mapping[str, T], *paths: str) -> dict[str, T]:
    """Those at and below any of `paths`; below "" are all."""
    below = tuple(f"{path}." if path else "" for path in paths)
    return {name: module for name, module in modules.items() if name in paths or name.startswith(below)}


def activation_quantizers(network: Inserted, *paths: str) -> list[Quantizer]:
    inputs = [layer.input_quantizer for layer in inside(network.layers, *paths).values()]
    products = [q for product in inside(network.products, *paths).values() for q in product.ports().values()]
    return [q for q in (*inputs, *products) if q is not None and not q.dynamic]


def watched_layers(piece: Piece, roles: Sequence[str] = ()) -> list[nn.Module]:
    """Layers whose own outputs count in the loss: those of these roles; or all but the last, a split layer as one."""
    if roles:
        return [one for one in piece.module.modules() if isinstance(one, QuantLayer) and one.role in roles]
    if isinstance(piece.module, QuantLayer):
        return []
    outermost: dict[str, nn.Module] = {}
    for name, module in piece.module.named_modules():
        if isinstance(module, SplitLayer | QuantLayer) and not any(
            name.startswith(f"{path}.") for path in outermost
        ):
            outermost[name] = module
    return list(outermost.values())[:-1]


def watch_layers(piece: Piece, layers: Sequence[nn.Module], columns: Sequence[Tensor]) -> Outputs:
    """What the piece returns, and what these layers in it do."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda m, a, out: seen.append(out)).remove)
        return Outputs(piece.outputs(columns), [by_record(out, len(columns[0])) for out in seen])


def by_record(out: Tensor, records: int) -> Tensor:
    """What a layer inside a piece returns, one entry for each record; what it returns for all, for each of them."""
    rows, rest = divmod(len(out), records)
    return fold(out, rows) if rows and not rest else out.expand(records, *out.shape)
