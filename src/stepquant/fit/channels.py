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
from stepquant.models.blocks.fold import folds
from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import read_by
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


def with_ranges(network: Inserted, without: tuple[str, ...]) -> dict[str, QuantLayer]:
    """The linears of other roles whose inputs have ranges; none is an error."""
    found = {
        path: layer
        for path, layer in divisible(network.layers, without).items()
        if layer.input_quantizer is not None and not layer.input_quantizer.dynamic
    }
    if not found:
        raise MethodError(
            "there is no linear whose input channels could be balanced for a range",
            got=f"plan '{network.plan.name}' on {len(network.layers)} layers",
            expected="linears of attentions or feed-forwards, with ranges of their inputs",
            fix="choose another method, as gptq, or a scheme with ranges, as w8a8",
        )
    return found


class Greatest:
    """The greatest magnitude of each input channel of a layer in a sample: on average over samples, and of all of them."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.most = torch.zeros(())
        self.samples = 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().float().abs().reshape(len(x), -1, x.shape[-1]).amax(1)
        self.total = rows.sum(0) if self.total is None else self.total + rows.sum(0)
        self.most = torch.maximum(self.most.to(rows), rows.amax(0))
        self.samples += len(rows)

    def of_all(self, path: str) -> Tensor:
        self.mean(path)
        return self.most

    def mean(self, path: str) -> Tensor:
        return finite(self.total, path, "cannot be balanced") / self.samples


def finite(found: Tensor | None, path: str, otherwise: str) -> Tensor:
    """What was found of the inputs of a layer, which must have run, and on numbers."""
    if found is None:
        raise MethodError(f"'{path}' never ran during calibration", fix="keep it in float with a plan rule")
    if not found.isfinite().all():
        raise CalibrationError(
            f"the inputs of '{path}' are not finite, and {otherwise}",
            fix="keep this layer, or the one before it, in float with a plan rule",
        )
    return found


def greatest_inputs(
    network: Inserted,
    layers: Mapping[str, QuantLayer],
    data: CalibSet,
    batch: int,
    progress: Progress,
    *,
    of_all: bool = False,
) -> dict[str, Tensor]:
    """Of every layer, in the float model: of a record on average, or of all records."""
    seen = {path: Greatest() for path in layers}
    show_inputs(
        network, layers, {path: one.add for path, one in seen.items()}, data, batch, progress, "channels"
    )
    return {path: (found.of_all if of_all else found.mean)(path) for path, found in seen.items()}


def show_inputs(
    network: Inserted,
    layers: Mapping[str, QuantLayer],
    listeners: Mapping[str, Callable[[Tensor], None]],
    data: CalibSet,
    batch: int,
    progress: Progress,
    label: str,
) -> None:
    """What every layer reads in the float model, of all records, to the listener of its path."""

    def telling(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            listeners[path](read_by(args, kwargs))

        return hook

    network.switch(weights=False, inputs=False)
    hooks = [
        layer.register_forward_pre_hook(telling(path), with_kwargs=True) for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            for records in progress.track(data.batches(batch), label, -(-len(data) // batch)):
                network.denoiser.predict(records.arguments)
    finally:
        for hook in hooks:
            hook.remove()


def balance_channels(layers: Mapping[str, QuantLayer], greatest: Mapping[str, Tensor], alpha: float) -> None:
    """Greatest weight^(1 - alpha) / greatest input^alpha multiplies each channel of an input."""
    for path, layer in layers.items():
        layer.divide(finite_factors(greatest[path], layer.weight.detach(), alpha, 1 - alpha, path), None)


def balance_behind_norms(
    network: Inserted, layers: Mapping[str, QuantLayer], greatest: Mapping[str, Tensor], alpha: float
) -> set[str]:
    """Balance layers behind a norm whose shift and scale another layer makes, which from then on makes them greater.

    Nothing multiplies at run time. Returns the layers that are balanced now: all that read one norm share their factors.
    """
    done: set[str] = set()
    for fold in folds(network.denoiser.model):
        readers = [layers[path] for path in fold.readers if path in layers]
        makers = [network.layers.get(source.path) for source in fold.sources]
        if len(readers) < len(fold.readers) or any(one is None or one.layer.bias is None for one in makers):
            continue
        weights = torch.cat([layer.weight.detach() for layer in readers])
        most = torch.stack([greatest[path] for path in fold.readers]).amax(0)
        factors = finite_factors(most, weights, alpha, 1 - alpha, fold.readers[0])
        for layer in readers:
            layer.absorb(factors)
        for source, maker in zip(fold.sources, makers):
            assert maker is not None
            maker.multiply_outputs(*source.multiplied(factors, len(maker.weight)))
        done |= set(fold.readers)
    return done


def rotate_channels(layers: Mapping[str, QuantLayer], most: int) -> list[str]:
    """Rotate what every layer reads, in the largest groups that fill it; returns the layers that none fills."""
    groups = {path: group_of(layer.weight.shape[1], most) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.rotate(groups[path])
    return [path for path, group in groups.items() if not group]
