"""Linears that hold packed integers and multiply with them, and the float branch that some have beside these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.entries import AGAIN
from stepquant.errors import ArtifactError
from stepquant.runtime import ops
from stepquant.runtime.device import device_for
from stepquant.runtime.kernel import Kernel
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.stored import Prepared, PreparedLayer, Stored, Versions


@dataclass(frozen=True, eq=False)
class PreparedBranch(Prepared):
    """Both sides in the dtypes of the inputs that came so far, plain and packed."""

    sides: dict[torch.dtype, tuple[Tensor, Tensor]]
    packed: dict[torch.dtype, tuple[Tensor, Tensor]]


class LowRankBranch(Stored[PreparedBranch]):
    """What a few directions of the input add to the output of integers: x down^T up^T, stored in 16 bits."""

    down: Tensor  # (rank, inputs)
    up: Tensor  # (outputs, rank)

    def __init__(self, inputs: int, outputs: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("down", torch.zeros(rank, inputs, dtype=torch.float16, device=device))
        self.register_buffer("up", torch.zeros(outputs, rank, dtype=torch.float16, device=device))
        self.fuses = True  # its products run in operations of the layer, where the kernel adds them

    def prepare(self, versions: Versions) -> PreparedBranch:
        return PreparedBranch(versions, {}, {})

    def forward(self, input: Tensor) -> Tensor:
        sides = self.prepared().sides
        if input.dtype not in sides:
            sides[input.dtype] = self.down.to(input.dtype), self.up.to(input.dtype)
        down, up = sides[input.dtype]
        return F.linear(F.linear(input, down), up)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of a few numbers, and the packed side with which the product's epilogue multiplies them: in bfloat16 where
        `x` is, else in float32."""
        packed = self.prepared().packed
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        if dtype not in packed:
            packed[dtype] = ops.pack_side(self.down, dtype), ops.pack_side(self.up, dtype)
        down, up = packed[dtype]
        return ops.multiply_side(x.reshape(-1, x.shape[-1]), down, len(self.down)), up

    def dense(self) -> Tensor:
        return self.up.float() @ self.down.float()


class IntegerLinear(IntegerLayer):
    """With a branch it reads floats, of which codes are made, and which the branch reads, too."""

    outputs_dim, rows_from = -1, -1
    first_output: Tensor  # what every first token becomes
    weight_zero_point: Tensor  # where the grid has one

    def __init__(self, layer: nn.Linear, spec: LayerSpec, groups: int = 1) -> None:
        super().__init__(layer, spec, groups)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        device = layer.weight.device
        if spec.first:
            self.register_buffer("first_output", torch.zeros(layer.out_features, device=device))
        if spec.rank:
            if spec.rank > min(layer.weight.shape):
                raise ArtifactError(
                    "a branch has more directions than its linear",
                    got=f"rank {spec.rank} beside {layer.in_features} inputs and {layer.out_features} outputs",
                    fix=AGAIN,
                )
            self.low_rank = LowRankBranch(layer.in_features, layer.out_features, spec.rank, device)

    @property
    def alone(self) -> bool:
        # Dynamo takes `super().alone` for true.
        return self.dynamic or self.spec.balanced or bool(self.spec.rank) or self.spec.first

    def kernel_type(self) -> type[Kernel]:
        return device_for(self.weight.device).linear

    def why_no_kernel(self) -> str | None:
        return device_for(self.weight.device).why_no_linear(self.weight.device)

    def of_floats(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.spec.first:
            return self.of_rows(x, dtype)
        others = self.of_rows(x[:, 1:], dtype)
        return torch.cat([self.first_output.to(dtype).expand(len(others), 1, -1), others], 1)

    def of_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Of floats that all meet the weight."""
        return self.with_branch(x, dtype) if self.spec.rank else super().of_floats(x, dtype)

    def with_branch(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the branch adds is the kernel's, or a tensor of its own."""
        if not self.prepared().kernels:
            y = self.float_forward(self.balanced(x), torch.float32)
            return (y + self.low_rank(x).to(dtype)).to(dtype)
        codes, scales = self.balanced_codes(x)
        flat = codes.reshape(-1, self.in_features)
        if self.low_rank.fuses and self.kernel_for_codes().adds_branch(flat):
            return self.from_codes(codes, dtype, row_scale=scales, branch=self.low_rank.factors(x))
        return self.from_codes(codes, dtype, self.low_rank(x).to(dtype), row_scale=scales)

    def balanced_codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """In one pass over the input, with the factors."""
        if not self.spec.balanced:
            return self.codes_of(x)
        if self.dynamic:
            return ops.rotate_quantize_rows(x, self.spec.rotation or 1, self.code, self.input_factors)
        return ops.quantize(x, self.code, self.input_factors), None

    def as_float(self, x: Tensor) -> Tensor:
        y = super().as_float(x)
        return y + self.low_rank(x) if self.spec.rank else y  # type: ignore[no-any-return]

    def total_weight(self, dtype: torch.dtype) -> Tensor:
        weight = super().total_weight(torch.float32 if self.spec.rank else dtype)
        return (weight + self.low_rank.dense()).to(dtype) if self.spec.rank else weight

    def from_codes(
        self,
        codes: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        gate: Tensor | None = None,
        *,
        row_scale: Tensor | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`gate` (samples, outputs) multiplies before `into` is added; with a `branch` the kernel is one that adds it."""
        kernel, rows = self.kernel_for_codes(), None if row_scale is None else row_scale.flatten()
        given: tuple[Any, ...] = () if gate is None and rows is None and branch is None else (gate, rows)
        given = given if branch is None else (*given, branch)
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
        grid, scale = self.spec.weight, self.by_output(self.weight_scale)
        if grid.symmetric:
            zero_point = torch.full_like(scale, -grid.qmin, dtype=torch.int16)
        else:
            zero_point = self.by_output(self.weight_zero_point) - grid.qmin
        rows = x.reshape(-1, self.in_features)
        y = ops.stored_linear(rows, self.weight, grid.bits, zero_point, scale, self.bias, dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def by_output(self, numbers: Tensor) -> Tensor:
        """(outputs, groups) of what the weight has one for each group, each output, or once."""
        return (numbers if numbers.numel() > 1 else numbers.expand(self.out_features)).reshape(
            self.out_features, -1
        )

    def reads_stored(self, x: Tensor) -> bool:
        return x.numel() <= self.prepared().stored_rows * self.in_features

    def prepare(self, versions: Versions) -> PreparedLayer:
        return replace(super().prepare(versions), stored_rows=self.stored_rows())

    def stored_rows(self) -> int:
        """None unless only the weight is quantized, and nobody keeps its floats."""
        grid, group = self.spec.weight, self.weight_shape.numel() // self.weight_scale.numel()
        in_bytes = grid.bits == 8 or (grid.bits == 4 and min(group, self.in_features) % 2 == 0)
        kept = self.float_because or self.keeps_weight
        plain = self.spec.input is None and not (self.spec.rotation or self.spec.offset or grid.codebook)
        if not plain or kept or not in_bytes:
            return 0
        return device_for(self.weight.device).stored_rows

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)
