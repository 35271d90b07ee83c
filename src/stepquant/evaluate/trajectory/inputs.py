"""Ranges of the layers' inputs along the float trajectory, beside the range that their grids cover."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import read_by
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import runtime_modules
from stepquant.runtime.ops.code import Code


@dataclass(frozen=True)
class Seen:
    """Lowest and highest value of one input, and the share of values outside its limits where it has limits."""

    low: float
    high: float
    clipped: float | None


def limits(quantized: Denoiser) -> dict[str, tuple[float, float]]:
    """Path -> lowest and highest number that the layer's input integers hold to within half a step."""
    layers = {
        path: module
        for path, module in runtime_modules(quantized.model).items()
        if isinstance(module, IntegerLayer)
    }
    codes = {
        path: layer.code
        for path, layer in layers.items()
        if layer.spec.input is not None and not (layer.dynamic or layer.spec.balanced or layer.spec.first)
    }
    return {path: (edge(code, code.low - 0.5), edge(code, code.high + 0.5)) for path, code in codes.items()}


def edge(code: Code, place: float) -> float:
    """The number that a fractional code stands for."""
    return (place - code.zero_point) * code.scale


@contextmanager
def watch_inputs(
    source: Denoiser, allowed: Mapping[str, tuple[float, float]], wanted: Callable[[], bool]
) -> Iterator[dict[str, Seen]]:
    """What every layer of the float model received in its latest call, while `wanted` says so."""
    found: dict[str, Seen] = {}
    modules = dict(source.model.named_modules())

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if wanted():
                found[path] = see(read_by(args, kwargs), allowed.get(path))

        return hook

    with ExitStack() as stack:
        for path in source.sites():
            handle = modules[path].register_forward_pre_hook(watch(path), with_kwargs=True)
            stack.callback(handle.remove)
        yield found


def see(x: Tensor, ends: tuple[float, float] | None) -> Seen:
    """Lowest, highest, and the share outside of the limits."""
    low, high = float(x.min()), float(x.max())
    clipped = None if ends is None else float(((x < ends[0]) | (x > ends[1])).double().mean())
    return Seen(low, high, clipped)
