"""Layers that this machine computes faster in float than in integers, timed by themselves, and kept in float.

What an artifact predicts then depends on the machine, by as much as it matters whether those layers are quantized. So this
happens only where it is asked for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.progress import Progress, Silent
from stepquant.runtime.blocks.chain import chains
from stepquant.runtime.blocks.install import forget_kept
from stepquant.runtime.coverage import apart
from stepquant.runtime.layers.convolution import IntegerConv2d, channels_last
from stepquant.runtime.layers.layer import IntegerLayer

Seconds = tuple[float, float]  # in integers, in float

ROUNDS, LONG_ENOUGH = 15, 2e-4  # seconds that one timing lasts at least
# A layer that would gain less than this of its time stays in integers, whatever the noise of the day.
WORTH = 0.05


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer in one call. Its input is there already, as codes or as floats: norms write either."""

    path: str
    integer: float
    floating: float
    stays_float: bool


@dataclass(frozen=True)
class Reading:
    """How a layer was called with codes."""

    shape: torch.Size
    dtype: torch.dtype  # of its output
    added: bool
    border: tuple[int, ...] | None = None
    doubled: bool = False


def choose_float_layers(
    model: nn.Module,
    arguments: Mapping[str, Any],
    known: MutableMapping[str, Seconds],
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> list[LayerTime]:
    """Let every layer of a lowered model whose float form, in `dtype`, is faster in such a call stay float.

    Layers that share a product go together. `known` has times of layers and shapes, and takes those that it lacks.
    """
    release(model)
    layers = integer_layers(model)
    readings = read_once(model, layers, arguments)
    taken: dict[str, Seconds] = {}
    for path in (progress or Silent()).track(readings, "timing layers", len(readings)):
        key = f"{layers[path]} {layers[path].geometry()} {readings[path]} {short(dtype)}"
        if key not in known:
            known[key] = race(*forms(layers[path], readings[path], dtype))
        taken[path] = known[key]
    found = []
    for group in together(model, taken):
        integer, floating = (sum(taken[path][form] for path in group) for form in (0, 1))
        stays = floating < (1 - WORTH) * integer
        found += [LayerTime(path, *taken[path], stays) for path in group]
        for path in group if stays else ():
            times = f"{1e6 * floating:.0f} us, not {1e6 * integer:.0f}"
            layers[path].stay_float(f"{short(dtype)} is faster here: {times}")
    return found


def release(model: nn.Module) -> None:
    """Let all layers multiply integers again."""
    for layer in integer_layers(model).values():
        layer.stay_float(None)


def integer_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, IntegerLayer)}


def read_once(
    model: nn.Module, layers: Mapping[str, IntegerLayer], arguments: Mapping[str, Any]
) -> dict[str, Reading]:
    """How each layer reads codes in one call, layers with a common product one by one."""
    readings: dict[str, Reading] = {}
    forget_kept(model)
    with ExitStack() as stack, torch.no_grad():
        for chain in chains(model):
            stack.enter_context(apart(chain))
        for path, layer in layers.items():
            stack.enter_context(listening(layer, path, readings))
        model(**arguments)
    forget_kept(model)
    return readings


@contextmanager
def listening(layer: IntegerLayer, path: str, readings: dict[str, Reading]) -> Iterator[None]:
    former: Any = layer.from_codes

    def from_codes(
        codes: Tensor, dtype: torch.dtype, into: Tensor | None = None, *walk: Any, **named: Tensor | None
    ) -> Tensor:
        readings[path] = Reading(codes.shape, dtype, into is not None, *walk)
        return former(codes, dtype, into, *walk, **named)  # type: ignore[no-any-return]

    layer.from_codes = from_codes  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.from_codes


def forms(
    layer: IntegerLayer, reading: Reading, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The layer in integers and in float, each behind an input of its own."""
    codes = channels_last(torch.randint(0, 256, reading.shape, dtype=torch.uint8))
    x = channels_last(torch.randn(reading.shape).to(dtype))
    weight = layer.dequantized(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    walk = (reading.border, reading.doubled) if isinstance(layer, IntegerConv2d) else ()
    with torch.no_grad():
        out = layer.from_codes(codes, reading.dtype, None, *walk)  # type: ignore[call-arg]
    into = torch.zeros_like(out) if reading.added else None

    def integer() -> Tensor:
        return layer.from_codes(codes, reading.dtype, into, *walk)  # type: ignore[call-arg]

    def floating() -> Tensor:
        y = F.interpolate(x, scale_factor=2.0) if reading.doubled else x
        y = y if reading.border is None else F.pad(y, reading.border)
        y = layer.multiply(y, weight, bias).to(reading.dtype)
        return y if into is None else y + into

    return integer, floating


@torch.no_grad()
def race(*calls: Callable[[], object]) -> Seconds:
    """Medians of rounds in which both take turns."""
    repeats = []
    for call in calls:
        call()
        repeats.append(max(1, int(LONG_ENOUGH / max(clock(call, 1), 1e-7))))
    rounds = [[clock(call, count) for call, count in zip(calls, repeats)] for _ in range(ROUNDS)]
    integer, floating = (statistics.median(seconds) for seconds in zip(*rounds))
    return integer, floating


def clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one of so many calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def together(model: nn.Module, paths: Iterable[str]) -> Iterator[Sequence[str]]:
    """Paths of layers that are decided together: those of one product, and every other by itself."""
    path_of = {module: path for path, module in model.named_modules()}
    left = dict.fromkeys(paths)
    for chain in chains(model):
        for joint in chain.joints:
            group = [path_of[layer] for layer in joint.layers if path_of[layer] in left]
            for path in group:
                del left[path]
            if group:
                yield group
    for path in left:
        yield [path]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
