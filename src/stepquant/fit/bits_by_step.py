"""Bits of what layers read, shared out over layers and steps by how much the prediction loses of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.core.grid import Grid
from stepquant.core.knapsack import choose
from stepquant.core.levels import rounded_over
from stepquant.core.ranges import SlicedSearch
from stepquant.core.slices import Slices
from stepquant.core.steps import StepTable
from stepquant.fit.ranges import by_row, in_integers
from stepquant.progress import Progress
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer, apply_layer


@dataclass(frozen=True)
class Question:
    """What the inputs of layers cost in so many bits."""

    widths: Sequence[int]
    search: SlicedSearch
    states: int  # records of every step


def stepped(network: Inserted) -> dict[str, QuantLayer]:
    """The layers whose inputs have a range for every step; none where all of these have 8 bits, and nothing to share out."""
    found = {
        path: (layer, layer.input_quantizer.grid.bits)
        for path, layer in network.layers.items()
        if layer.input_quantizer is not None and layer.input_quantizer.has_rows
    }
    return (
        {path: layer for path, (layer, _) in found.items()} if any(b < 8 for _, b in found.values()) else {}
    )


@dataclass(frozen=True)
class Reading:
    """What the input of one layer costs: layers that follow each other with the same tensor have the same number."""

    tensor: int
    errors: list[float]  # mean squared ones of the output, for each width
    macs: int


def share_out_bits(
    network: Inserted,
    layers: Mapping[str, QuantLayer],
    data: CalibSet,
    table: StepTable,
    information: Mapping[str, Tensor],
    question: Question,
    progress: Progress,
) -> dict[str, list[int]]:
    """Bits of every layer's input at every row of the table: of least loss, and on average as many as it has now.

    A loss is the squared error that an input of so many bits makes in the layer's output, times how much the prediction
    depends on that output at that step. Averages are over multiplications. Who reads one tensor reads the same integers.
    Steps in float take no part.
    """
    losses: dict[tuple[int, int], list[float]] = {}
    macs: dict[tuple[int, int], int] = {}
    readers: dict[tuple[int, int], list[str]] = {}
    budget = 0.0
    found = {path: [bits_of(layer)] * table.groups for path, layer in layers.items()}
    for row, every in progress.track(by_row(data, table), "bits of steps", table.groups):
        records = in_integers(every, network.plan.float_steps)
        if records is None:
            continue
        few = records.take(range(min(question.states, len(records))))
        for path, one in readings(network, layers, few.arguments, question).items():
            place = (row, one.tensor)
            former = losses.get(place, [0.0] * len(one.errors))
            losses[place] = [
                old + float(information[path][row]) * new for old, new in zip(former, one.errors)
            ]
            macs[place] = macs.get(place, 0) + one.macs
            readers.setdefault(place, []).append(path)
            budget += bits_of(layers[path]) * one.macs
    costs = [[float(bits * macs[place]) for bits in question.widths] for place in losses]
    for place, index in zip(losses, choose(list(losses.values()), costs, budget)):
        for path in readers[place]:
            found[path][place[0]] = question.widths[index]
    return found


def bits_of(layer: QuantLayer) -> int:
    """Of its input."""
    assert layer.input_quantizer is not None
    return layer.input_quantizer.grid.bits


@torch.no_grad()
def readings(
    network: Inserted, layers: Mapping[str, QuantLayer], arguments: Mapping[str, Any], question: Question
) -> dict[str, Reading]:
    """Of every layer, in a call of the float model."""
    found: dict[str, Reading] = {}
    last: list[Tensor] = []

    def asking(path: str, layer: QuantLayer) -> Any:
        def hook(quantizer: Any, args: tuple[Tensor], _: Tensor) -> None:
            x, errors, outputs = args[0], [], 0
            tensor = max((one.tensor for one in found.values()), default=-1)
            tensor += not (last and last[0] is x)
            last[:] = [x]
            for bits in question.widths:
                lost = rounded(x, replace(quantizer.grid, bits=bits), question.search) - x
                y = apply_layer(layer.layer, lost, layer.weight, None)
                errors.append(float(y.double().square().mean()))
                outputs = y.numel()
            found[path] = Reading(tensor, errors, outputs * layer.weight[0].numel())

        return hook

    network.switch(weights=False, inputs=False)
    with ExitStack() as hooks:
        for path, layer in layers.items():
            quantizer: nn.Module | None = layer.input_quantizer
            assert quantizer is not None
            hooks.callback(quantizer.register_forward_hook(asking(path, layer)).remove)
        network.denoiser.predict(arguments)
    return found


def rounded(x: Tensor, grid: Grid, search: SlicedSearch) -> Tensor:
    """With the range that these values would have."""
    return rounded_over(x, *search(Slices.of(x), grid), grid)
