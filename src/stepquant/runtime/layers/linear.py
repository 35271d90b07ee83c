"""Linears that hold packed integers and multiply with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.runtime import ops
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

    def float_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Where few rows meet a large weight, nearly all time goes into reading it: as it is stored, a quarter of the bytes."""
        if not self.reads_stored(x):
            return super().float_forward(x, dtype)
        grid = self.spec.weight
        scale = self.weight_scale[:, None].expand(-1, self.out_features // self.weight_scale.numel() or 1)
        scale = scale.reshape(self.out_features, -1)
        zero_point = getattr(self, "weight_zero_point", torch.zeros(1, dtype=torch.int16))
        zeros = (zero_point - grid.qmin).reshape(-1, 1).expand(-1, scale.numel() // zero_point.numel())
        rows = x.reshape(-1, self.in_features)
        y = ops.stored_linear(
            rows, self.weight, grid.bits, zeros.reshape(scale.shape), scale, self.bias, dtype
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def reads_stored(self, x: Tensor) -> bool:
        """Whether only the weight is quantized, for too few numbers to be worth its floats."""
        few = device_for(self.weight.device).stored_rows * self.in_features
        grid, group = self.spec.weight, self.weight_shape.numel() // self.weight_scale.numel()
        whole = grid.bits == 8 or (grid.bits == 4 and min(group, self.in_features) % 2 == 0)
        return (
            self.spec.input is None
            and not self.float_because
            and not self.keeps_weight
            and whole
            and x.numel() <= few
        )

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)
