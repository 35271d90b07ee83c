"""Round the layers of a block one after another, each behind the layers already rounded, so that errors compensate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stepquant.core.affine import to_groups
from stepquant.core.compensate import round_compensated
from stepquant.errors import MethodError
from stepquant.fit.learnable import FixedIntegers, kept
from stepquant.fit.learner import Learner, Sample, Schedule
from stepquant.fit.reconstruct import Report
from stepquant.fit.streams import Piece, Reached
from stepquant.models.hooks import read_by
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer

See = Callable[[Tensor], None]  # what a layer multiplies with its weight, batch by batch


@dataclass(frozen=True)
class Compensation:
    """How errors are spread over the weights that are still free."""

    damping: float = 0.01  # share of the mean diagonal that is added to the Hessian
    block: int = 128  # columns between updates of all the rest
    by_importance: bool = False
    batch: int = 32


def compensate_block(
    network: Inserted,
    piece: Piece,
    sample: Sample,
    seed: int,
    settings: Compensation,
    weights: Mapping[str, Tensor] | None = None,
) -> Report:
    """Round every layer of `piece`; all of them stay at nearest where that errs less on held-out records.

    `weights` of all records, for each layer: how much what it reads in them counts.
    """
    measure = Learner(network, piece, Schedule(0, settings.batch, rounding_rate=0), Generator())
    layers = {path: layer for path, layer in measure.layers.items() if layer.weight_quantizer is not None}
    with torch.no_grad():
        nearest = measure.held_loss(sample)
        for path in calls(piece, layers, sample):
            layer = layers[path]
            hessian = InputHessian(layer.layer)
            for rows in sample.train.split(settings.batch):
                see = hessian.add if weights is None else partial(hessian.add, weights=weights[path][rows])
                run_until(piece, layer, sample.quants.take(rows), see)
            try:
                layer.rounding = kept(FixedIntegers(compensated(layer, hessian.mean(), settings)), layer)
            except ValueError as error:
                raise MethodError(f"'{path}' cannot be rounded: {error}") from error
        hard = measure.held_loss(sample)
    if hard >= nearest:
        hard = nearest
        for layer in layers.values():
            layer.rounding = None
    return Report(piece.path, nearest, hard, hard, len(layers))


def compensated(layer: QuantLayer, hessian: Tensor, settings: Compensation) -> Tensor:
    """The integers of a layer, given the Hessian of every group of its input channels: (groups, inputs, inputs)."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight = layer.weight.detach().float()
    scale, zero_point = (
        value[:, None].expand_as(to_groups(weight, quantizer.grid)).reshape(len(weight), -1)
        for value in quantizer.range()
    )
    few = len(hessian)
    rows = [value.chunk(few) for value in (weight.flatten(1), scale, zero_point)]
    codebooks = quantizer.codebook.chunk(few) if quantizer.grid.codebook else [None] * few
    parts = [
        round_compensated(
            w,
            h,
            s,
            z,
            quantizer.grid,
            damping=settings.damping,
            block=settings.block,
            by_importance=settings.by_importance,
            codebook=codebook,
        )
        for w, h, s, z, codebook in zip(rows[0], hessian, rows[1], rows[2], codebooks)
    ]
    return torch.cat(parts).reshape(weight.shape)


class InputHessian:
    """Mean of x x^T over everything that a layer multiplies its weight with."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """What some records showed, each as often as its weight says."""
        columns = unfolded(self.layer, x.float())
        if weights is not None:
            each = weights.to(columns).sqrt().repeat_interleave(columns.shape[1] // len(weights))
            columns = columns * each[:, None]
        product = columns.transpose(1, 2) @ columns
        self.total = product if self.total is None else self.total + product
        self.count += columns.shape[1]

    def mean(self) -> Tensor:
        assert self.total is not None, "no records"
        return self.total / self.count


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output is the product of, (groups, outputs, inputs): patches for a convolution."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    geometry: Any = layer
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    x = F.pad(x, geometry._reversed_padding_repeated_twice, mode)
    axes = zip(geometry.kernel_size, geometry.stride, geometry.dilation)
    for axis, (size, stride, dilation) in enumerate(axes, start=2):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    # From (records, channels, places..., kernel...) to rows of a group's channels and kernel.
    places = len(geometry.kernel_size)
    x = x.movedim(1, 1 + places).flatten(0, places)
    rows = x.reshape(len(x), geometry.groups, -1)
    return rows.transpose(0, 1)


def calls(piece: Piece, layers: dict[str, QuantLayer], sample: Sample) -> list[str]:
    """Paths of the layers in the order in which the piece calls them."""
    order: list[str] = []
    names = {layer: path for path, layer in layers.items()}

    def note(layer: nn.Module, *_: Any) -> None:
        order.append(names[layer])  # type: ignore[index]

    handles = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        piece.outputs(sample.quants.take(sample.train[:2]))
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


def run_until(piece: Piece, layer: QuantLayer, columns: list[Tensor], see: See) -> None:
    """Run the piece up to this layer, and show what the layer's weight is multiplied with."""

    def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(layer.received(read_by(args, kwargs)))
        raise Reached

    handle = layer.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        piece.run(columns)
    except Reached:
        pass
    finally:
        handle.remove()
