"""Layers kept in float, whose neighbours compute in another dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.runtime.layers.convolution import channels_last
from stepquant.runtime.layers.stored import Prepared, Versions


@dataclass(frozen=True, eq=False)
class Cast(Prepared):
    """Weight and bias of a float layer in the dtypes of the inputs that came so far."""

    weights: dict[torch.dtype, tuple[Tensor, Tensor | None]]


class FloatLayer:
    """Stands in for the forward of a layer kept in float: casts its weight once to the dtype that reaches it."""

    def __init__(self, module: Any, emit: torch.dtype | None) -> None:
        self.module, self.emit = module, emit
        self.ready = Cast(Versions(), {})
        self.in_floats = False  # for the time of a step in float, when nothing is cast on its way

    def __call__(self, input: Tensor, *_: object, **__: object) -> Tensor:
        x, layer, ready = input, self.module, self.prepared()
        if x.dtype not in ready.weights:
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            ready.weights[x.dtype] = (layer.weight.to(x.dtype), bias)
        weights = ready.weights[x.dtype]
        linear = isinstance(layer, nn.Linear)
        y = F.linear(x, *weights) if linear else layer._conv_forward(channels_last(x), *weights)
        return y if self.emit is None or self.in_floats else y.to(self.emit)

    def prepared(self) -> Cast:
        ready = self.ready
        if not torch.compiler.is_compiling():
            versions = Versions.of(self.module._parameters.values())
            if versions != ready.versions:
                ready = self.ready = Cast(versions, {})
        return ready

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ready": Cast(Versions(), {})}
