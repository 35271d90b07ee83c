"""How much a prediction depends on what each layer returns, at every step: Fisher information of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Generator, Tensor, nn

from stepquant.calib.calibset import Batch, CalibSet
from stepquant.core.steps import StepTable
from stepquant.fit.ranges import by_row
from stepquant.progress import Progress
from stepquant.quant.insert import Inserted


def information(
    network: Inserted, data: CalibSet, table: StepTable, batch: int, generator: Generator, progress: Progress
) -> dict[str, Tensor]:
    """(rows of the table,) for every layer: the mean of (d <prediction, z> / d output)^2 with z of variance 1, in float.

    That is the diagonal of the Fisher matrix where a prediction has Gaussian noise, by one draw for each record.
    """
    network.switch(weights=False, inputs=False)
    found = {path: torch.zeros(table.groups, dtype=torch.float64) for path in network.layers}
    rows = by_row(data, table)
    for row, records in progress.track(rows, "sensitivity of steps", table.groups):
        for some in records.batches(batch):
            for path, square in squares(network, some, generator).items():
                found[path][row] += square * len(some) / len(records)
    return found


def squares(network: Inserted, some: Batch, generator: Generator) -> dict[str, float]:
    """Mean square of the gradient of every layer's output."""
    outputs: dict[str, Tensor] = {}

    def keeping(path: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            outputs[path] = y if y.requires_grad else y.requires_grad_()
            return outputs[path].clone()  # which may be written to

        return hook

    with ExitStack() as hooks, torch.enable_grad():
        for path, layer in network.layers.items():
            hooks.callback(layer.register_forward_hook(keeping(path)).remove)
        predicted = network.denoiser.predict(some.arguments)
        drawn = torch.randn(predicted.shape, generator=generator).to(predicted)
        gradients = torch.autograd.grad((predicted * drawn).sum(), list(outputs.values()), allow_unused=True)
    return {
        path: 0.0 if gradient is None else float(gradient.double().square().mean())
        for path, gradient in zip(outputs, gradients)
    }


def relative(found: Tensor) -> Tensor:
    """Of each step, beside the mean over all of them; 1 where nothing depends on the layer."""
    mean = found.mean()
    return found / mean if mean > 0 else torch.ones_like(found)
