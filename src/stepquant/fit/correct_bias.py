"""What takes back the part of an error that is no noise: constants for the means of quantized layers (arXiv:1906.04721,
section 4.2) and of probabilities, and factors for channels that shrink."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from stepquant.core.affine import fake_quantize
from stepquant.core.slices import Slices
from stepquant.fit.compensate import calls
from stepquant.fit.learnable import FixedIntegers, kept
from stepquant.fit.learner import Learner, Sample, Schedule, inside
from stepquant.fit.reconstruct import Report
from stepquant.fit.streams import Piece, Reached, Table
from stepquant.models.split import SplitLayer
from stepquant.quant.attention import QuantProduct
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer

MOST = 1.25  # a factor of a channel, or one over it


def correct_block(
    network: Inserted, piece: Piece, sample: Sample, seed: int, *, batch: int = 32, gain: bool = False
) -> Report:
    """Shift the bias of every layer until its mean output, per channel, is that of the float model.

    Layers are corrected in the order of their calls, each behind corrected ones; those without a bias are left alone,
    and a layer split over a concatenation is corrected as one. Weights and activations are quantized meanwhile.

    With `gain`, the rows of a layer's weight are scaled before, so that what a channel errs by does not depend on what it is
    in float: noise in front of a norm, or of a nonlinearity, makes what is behind it smaller.
    """
    measure = Learner(network, piece, Schedule(0, batch, rounding_rate=0), Generator())
    layers = {path: layer for path, layer in measure.layers.items() if is_biased(layer)}
    unsplit = {path: without_split(network, path) for path in layers}
    with torch.no_grad():
        before = measure.held_loss(sample)
        network.switch(weights=False, inputs=False)
        exact = mean_outputs(network, piece, unsplit, sample.floats, batch)
        network.switch(weights=True, inputs=True)
        network.at(sample.train[:2])
        for path in calls(piece, layers, sample):
            if gain and can_be_scaled(layers[path]) and unsplit[path] is layers[path]:
                scale_rows(layers[path], gains(network, piece, layers[path], sample, batch))
            found = mean_output(network, piece, unsplit[path], sample.quants, batch)
            layers[path].correction = exact[path] - found
        after = measure.held_loss(sample)
    return Report(piece.path, before, after, after, len(layers))


def can_be_scaled(layer: QuantLayer) -> bool:
    """Whether rows of its weight have scales of their own, and are all that its outputs depend on."""
    assert layer.weight_quantizer is not None
    return layer.branch is None and layer.weight_quantizer.scale.numel() % len(layer.weight) == 0


def scale_rows(layer: QuantLayer, factors: Tensor) -> None:
    """Multiply what each row of the weight stands for; its integers stay."""
    assert layer.weight_quantizer is not None
    layer.rounding = kept(FixedIntegers(layer.weight_integers()), layer)
    scale, zero_point = layer.weight_quantizer.range()
    layer.weight_quantizer.set_range(
        scale * factors.to(scale).repeat_interleave(len(scale) // len(factors)), zero_point
    )


def gains(network: Inserted, piece: Piece, layer: QuantLayer, sample: Sample, batch: int) -> Tensor:
    """One over the slope of every channel of a quantized layer, over what it is in float; 1 where it hardly follows that."""
    outputs = partial(rows_of, network, piece, layer)
    sums = torch.zeros(5, len(layer.weight), dtype=torch.float64)
    for records in torch.arange(len(sample.quants.columns[0])).split(batch):
        x = outputs(sample.floats, records, quantized=False)
        y = outputs(sample.quants, records, quantized=True)
        found = [torch.full_like(x[0], len(x)), x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)]
        sums += torch.stack(found).cpu()
    count, x, y, xx, xy = sums
    slope = (xy - x * y / count) / (xx - x * x / count).clamp(min=1e-12)
    follows = (slope - 1).abs() < 1 / 2
    return torch.where(follows, 1 / slope, torch.ones_like(slope)).clamp(1 / MOST, MOST).float()


def rows_of(
    network: Inserted, piece: Piece, layer: nn.Module, inputs: Table, records: Tensor, *, quantized: bool
) -> Tensor:
    """What a layer returns in a call of its block, which ends there: one row for every output place."""
    seen: list[Tensor] = []

    def listen(_: nn.Module, __: Any, out: Tensor) -> None:
        seen.append(channels_last(layer, out).double())
        raise Reached

    network.switch(weights=quantized, inputs=quantized)
    network.at(records)
    handle = layer.register_forward_hook(listen)
    try:
        with suppress(Reached):
            piece.run(inputs.take(records))
    finally:
        handle.remove()
    return seen[0]


def correct_products(
    network: Inserted, piece: Piece, sample: Sample, seed: int, *, batch: int = 32
) -> Report:
    """Add to the quantized probabilities of every attention product what they lack on average (SBC, arXiv:2309.01729).

    Most probabilities of a wide softmax are below half of the scale and become 0, so that their sum is no longer 1.
    """
    measure = Learner(network, piece, Schedule(0, batch, rounding_rate=0), Generator())
    found = inside(network.products, piece.path).items()
    products = {path: product for path, product in found if not product.probabilities.dynamic}
    with torch.no_grad():
        before = measure.held_loss(sample)
        for product in products.values():
            product.correction = None
            product.correction = missing(network, piece, product, sample.quants, batch)
        after = measure.held_loss(sample) if products else before
    return Report(piece.path, before, after, after, len(products))


def missing(network: Inserted, piece: Piece, product: QuantProduct, inputs: Table, batch: int) -> Tensor:
    """Mean of the probabilities less the mean of the quantized ones, over all records, heads and pairs of tokens."""
    lacks: list[Tensor] = []
    counts: list[int] = []

    def observe(quantizer: Quantizer, values: Slices) -> None:
        scale, zero_point = quantizer.present()
        for x in values:
            lacks.append((x.double() - fake_quantize(x, scale, zero_point, quantizer.grid).double()).sum())
        counts.append(values.count)

    product.probabilities.observer = observe
    try:
        for rows in alike(network, torch.arange(len(inputs.columns[0])), batch):
            network.at(rows)
            piece.run(inputs.take(rows))
    finally:
        product.probabilities.observer = None
    return (torch.stack(lacks).sum() / sum(counts)).float().reshape(1)


def alike(network: Inserted, records: Tensor, batch: int) -> list[Tensor]:
    """Batches of records whose activations are rounded, and that read the same row of per-step ranges."""
    if network.clock is None:
        return list(records.split(batch))
    network.at(records)
    rows, floats = network.clock.rows, network.clock.floats
    rows = torch.zeros_like(records) if rows is None else rows
    inner = torch.ones_like(records, dtype=torch.bool) if floats is None else ~floats
    return [
        some for row in rows.unique() for some in records[(rows == row) & inner].split(batch) if len(some)
    ]


def is_biased(layer: QuantLayer) -> bool:
    return layer.weight_quantizer is not None and layer.bias is not None


def without_split(network: Inserted, path: str) -> nn.Module:
    """The layer at `path`, or the split layer that it is the first half of."""
    above = network.denoiser.model.get_submodule(path.rpartition(".")[0])
    return above if isinstance(above, SplitLayer) else network.layers[path]


def mean_outputs(
    network: Inserted, piece: Piece, layers: Mapping[str, nn.Module], inputs: Table, batch: int
) -> dict[str, Tensor]:
    """The mean of every output channel of these layers over all records."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def listen(path: str, out: Tensor) -> None:
        rows = channels_last(layers[path], out).double()
        sums[path] = sums.get(path, torch.zeros(())) + rows.sum(0)
        counts[path] = counts.get(path, 0) + len(rows)

    with ExitStack() as hooks:
        for path, layer in layers.items():
            handle = layer.register_forward_hook(lambda m, a, out, path=path: listen(path, out))
            hooks.callback(handle.remove)
        for rows in torch.arange(len(inputs.columns[0])).split(batch):
            network.at(rows)
            piece.run(inputs.take(rows))
    return {path: (total / counts[path]).float() for path, total in sums.items()}


def mean_output(network: Inserted, piece: Piece, layer: nn.Module, inputs: Table, batch: int) -> Tensor:
    """That of one quantized layer, behind which nothing is run."""
    total, count = torch.zeros(()), 0
    for records in torch.arange(len(inputs.columns[0])).split(batch):
        rows = rows_of(network, piece, layer, inputs, records, quantized=True)
        total, count = total + rows.sum(0), count + len(rows)
    return (total / count).float()


def channels_last(layer: nn.Module, out: Tensor) -> Tensor:
    """One row of channels for every output place."""
    first: Any = layer.get_submodule("0") if isinstance(layer, SplitLayer) else layer
    is_linear = isinstance(first.layer, nn.Linear)
    return (out if is_linear else out.movedim(1, -1)).flatten(0, -2)
