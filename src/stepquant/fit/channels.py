"""Balance the channels of what linears read by the token: lasting outliers by a factor each, the others by rotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.core.grid import Grid
from stepquant.core.rotation import group_of
from stepquant.errors import CalibrationError, MethodError
from stepquant.fit.low_rank import divisible, finite_factors
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Progress
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer
from stepquant.quant.plan import Plan

REASON = "the scale of each token as it comes"


def by_token(denoiser: Denoiser, plan: Plan, without: tuple[str, ...] = ()) -> Plan:
    """`plan`, whose linears of other roles read integers of as many bits with a scale for each token.

    Those that read floats, and those whose weights are in groups, stay as they are.
    """
    decided, grids = plan.resolve(denoiser), dict[tuple[str, str], Grid]()
    for path, role in denoiser.sites().items():
        weight, inputs = decided[path, "weight"].grid, decided[path, "input"].grid
        linear = isinstance(denoiser.model.get_submodule(path), nn.Linear) and role not in without
        if linear and weight and inputs and not weight.group:
            grids[path, "input"] = Grid(inputs.bits, granularity="token")
    if not grids:
        raise MethodError(
            "there is no linear whose inputs could be quantized by the token",
            got=f"plan '{plan.name}' on {len(denoiser.sites())} layers",
            expected="linears of attentions or feed-forwards, with quantized inputs and weights by the channel",
            fix="choose another method, as gptq, or a scheme that quantizes activations, as w8a8",
        )
    return plan.with_grids(grids, REASON)


def read_by_token(network: Inserted, without: tuple[str, ...] = ()) -> dict[str, QuantLayer]:
    """The linears that a plan of `by_token` is about."""
    return {
        path: layer
        for path, layer in divisible(network.layers, without).items()
        if layer.weight_quantizer is not None
        and not layer.weight_quantizer.grid.group
        and layer.input_quantizer is not None
        and layer.input_quantizer.dynamic
    }


class Greatest:
    """The greatest magnitude of each input channel of a layer in a sample, on average over samples."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().float().abs().reshape(len(x), -1, x.shape[-1]).amax(1)
        self.total = rows.sum(0) if self.total is None else self.total + rows.sum(0)
        self.samples += len(rows)

    def mean(self, path: str) -> Tensor:
        if self.total is None:
            raise MethodError(
                f"'{path}' never ran during calibration", fix="keep it in float with a plan rule"
            )
        if not self.total.isfinite().all():
            raise CalibrationError(
                f"the inputs of '{path}' are not finite, and cannot be balanced",
                fix="keep this layer, or the one before it, in float with a plan rule",
            )
        return self.total / self.samples


def greatest_inputs(
    network: Inserted, layers: Mapping[str, QuantLayer], data: CalibSet, batch: int, progress: Progress
) -> dict[str, Tensor]:
    """Of every layer, in the float model."""
    seen = {path: Greatest() for path in layers}

    def noting(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[path].add(args[0] if args else kwargs["input"])

        return hook

    network.switch(weights=False, inputs=False)
    hooks = [
        layer.register_forward_pre_hook(noting(path), with_kwargs=True) for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            for records in progress.track(data.batches(batch), "channels", -(-len(data) // batch)):
                network.denoiser.predict(records.arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: found.mean(path) for path, found in seen.items()}


def balance_channels(layers: Mapping[str, QuantLayer], greatest: Mapping[str, Tensor], alpha: float) -> None:
    """Greatest weight^(1 - alpha) / greatest input^alpha multiplies each channel of an input."""
    for path, layer in layers.items():
        layer.divide(finite_factors(greatest[path], layer.weight.detach(), alpha, 1 - alpha, path), None)


def rotate_channels(layers: Mapping[str, QuantLayer], most: int) -> list[str]:
    """Rotate what every layer reads, in the largest groups that fill it; returns the layers that none fills."""
    groups = {path: group_of(layer.weight.shape[1], most) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.rotate(groups[path])
    return [path for path, group in groups.items() if not group]
