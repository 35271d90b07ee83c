"""Weights that are kept as packed integers: their buffers, and the numbers that these stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.artifact import LayerSpec
from stepquant.core.affine import dequantize, to_groups
from stepquant.core.pack import packed_bytes, unpack
from stepquant.runtime.layers.stored import P, Stored


class PackedWeight(Stored[P]):
    """The integers of one weight in a dense stream of bytes, and their scales."""

    spec: LayerSpec
    weight: Tensor
    weight_shape: torch.Size
    weight_scale: Tensor
    weight_codebook: Tensor | None  # the integers that each row may take
    weight_offset: Tensor | None

    def make_weight(self, weight: Tensor, spec: LayerSpec) -> None:
        """Buffers without numbers."""
        self.spec, self.weight_shape = spec, torch.Size(weight.shape)
        rows = to_groups(torch.empty(weight.shape, device="meta"), spec.weight).shape[0]
        size, device = packed_bytes(weight.numel(), spec.weight.bits), weight.device
        self.register_buffer("weight", torch.zeros(size, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones(rows, device=device))
        if not spec.weight.symmetric:
            self.register_buffer("weight_zero_point", torch.zeros(rows, dtype=torch.int16, device=device))
        codebook = torch.zeros((rows, spec.weight.levels) if spec.weight.codebook else 0, dtype=torch.int8)
        self.register_buffer("weight_codebook", codebook.to(device) if spec.weight.codebook else None)
        self.register_buffer("weight_offset", torch.zeros(rows, device=device) if spec.offset else None)

    def rows(self) -> tuple[Tensor, Tensor]:
        """The weight's integers and their zero points, one row per scale."""
        count, rows = self.weight_shape.numel(), self.weight_scale.numel()
        integers = unpack(self.weight, self.spec.weight, count, self.weight_codebook).reshape(rows, -1)
        zero_point = getattr(self, "weight_zero_point", None)
        return integers, torch.zeros_like(integers[:, :1]) if zero_point is None else zero_point[:, None]

    def signed_bytes(self) -> Tensor:
        """q - zero_point in the shape of the weight."""
        grid = self.spec.weight
        if grid.signed and grid.symmetric and grid.bits == 8:  # the same without numbers of 16 bits
            return (self.weight.view(torch.int8) + grid.qmin).reshape(self.weight_shape)
        return torch.sub(*self.rows()).to(torch.int8).reshape(self.weight_shape)

    def stored_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that the integers stand for, which is a rotated one where inputs are rotated."""
        grid, rows = self.spec.weight, self.weight_scale.numel()
        if grid.signed and grid.symmetric and grid.bits == 8:  # in one pass over the weight
            values = self.signed_bytes().reshape(rows, -1) * self.weight_scale[:, None]
        else:
            integers, zero_point = self.rows()
            values = dequantize(integers.float(), self.weight_scale[:, None], zero_point)
        if self.weight_offset is not None:
            values += self.weight_offset[:, None]
        return values.reshape(self.weight_shape).to(dtype)

    def total_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight of what this stands for in float."""
        return self.stored_weight(dtype)

    def fits_signed_bytes(self) -> bool:
        grid = self.spec.weight
        if grid.signed and grid.symmetric:
            return grid.bits < 8 or bool(self.weight.max() < 255)
        centred = torch.sub(*self.rows())
        return bool(centred.min() >= -128 and centred.max() <= 127)
