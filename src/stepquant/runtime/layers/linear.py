"""Linears that hold packed integers and multiply with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.runtime.device import device_for
from stepquant.runtime.kernel import Kernel
from stepquant.runtime.layers.layer import IntegerLayer


class IntegerLinear(IntegerLayer):
    outputs_dim, rows_from = -1, -1

    def __init__(self, layer: nn.Linear, spec: LayerSpec, groups: int = 1) -> None:
        super().__init__(layer, spec, groups)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def kernel_type(self) -> type[Kernel]:
        return device_for(self.weight.device).linear

    def why_no_kernel(self) -> str | None:
        return device_for(self.weight.device).why_no_linear(self.weight.device)

    def from_codes(
        self, codes: Tensor, dtype: torch.dtype, into: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """`gate` (samples, outputs) multiplies before `into` is added."""
        kernel, given = self.kernel_for_codes(), () if gate is None else (gate,)
        if codes.dim() == 2:
            return kernel(codes, dtype, into, *given)
        flat = None if into is None else into.reshape(-1, self.out_features)
        return kernel(codes.reshape(-1, self.in_features), dtype, flat, *given).reshape(
            *codes.shape[:-1], self.out_features
        )

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)
