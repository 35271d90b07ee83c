"""Convolutions that hold packed integers and multiply with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.models.causal import border_of, bordered
from stepquant.runtime.device import device_for
from stepquant.runtime.kernel import Geometry, Kernel
from stepquant.runtime.layers.layer import IntegerLayer


class IntegerConv2d(IntegerLayer):
    """A convolution whose border is padded with the input's zero point, which is what a float zero becomes."""

    outputs_dim, rows_from = 1, 1

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, spec: LayerSpec, groups: int = 1) -> None:
        super().__init__(layer, spec, groups)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        # (left, right, top, bottom, ...): the order of F.pad, last dimension first
        self.sides: tuple[int, ...] = tuple(layer._reversed_padding_repeated_twice)
        self.even = self.sides[::2] == self.sides[1::2]

    def kernel_type(self) -> type[Kernel]:
        kernel = device_for(self.weight.device).convolution
        assert kernel is not None, self.why_no_kernel()
        return kernel

    def why_no_kernel(self) -> str | None:
        if self.padding_mode != "zeros":
            return f"no integer kernel for {self.padding_mode} padding"
        return device_for(self.weight.device).why_no_convolution(self.weight.device, self.geometry())

    def geometry(self) -> Geometry:
        padding = self.sides[::-2] if self.even else (0,) * len(self.stride)
        return Geometry(plane(self.stride, 1), plane(padding, 0), plane(self.dilation, 1), self.groups)

    def from_codes(
        self,
        codes: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        *walk: Any,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        kernel = self.kernel_for_codes()
        return kernel(codes, dtype, into, row_scale, *(walk if self.even else ((*self.sides, 0, 0)[:4],)))

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = channels_last(x)
        if self.even and self.padding_mode == "zeros":
            return self.convolve(x, weight, bias, self.stride, self.sides[::-2], self.dilation, self.groups)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return self.convolve(
            F.pad(x, self.sides, mode), weight, bias, self.stride, 0, self.dilation, self.groups
        )

    def convolve(self, *args: Any) -> Tensor:
        return F.conv2d(*args)


class IntegerConv1d(IntegerConv2d):
    """A convolution over one dimension, run as one over an image of height one."""

    def kernel_weight(self) -> Tensor:
        return super().kernel_weight().unsqueeze(2)

    def from_codes(
        self,
        codes: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        *_: Any,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        lines = None if into is None else into.unsqueeze(2)
        return super().from_codes(codes.unsqueeze(2), dtype, lines, row_scale=row_scale).squeeze(2)

    def convolve(self, *args: Any) -> Tensor:
        return F.conv1d(*args)


class IntegerConv3d(IntegerConv2d):
    """A convolution over time and image, run as one over images: the frames that it sums lie side by side in its channels."""

    def __init__(self, layer: nn.Conv3d, spec: LayerSpec, groups: int = 1) -> None:
        super().__init__(layer, spec, groups)
        self.border = border_of(layer)
        if (
            self.border is not None
        ):  # torch keeps what the layer was made with, which its class takes upon itself
            self.sides, self.even = (0,) * 6, True

    def forward(self, input: Tensor, *kept: Any, **__: object) -> Tensor:
        """`kept` are frames that a causal convolution reads before these."""
        return super().forward(bordered(input, self.border, *kept) if self.border else input)

    def kernel_weight(self) -> Tensor:
        return super().kernel_weight().flatten(1, 2)

    def geometry(self) -> Geometry:
        padding = (self.sides[2], self.sides[0]) if self.even else (0, 0)
        return Geometry(self.stride[1:], padding, self.dilation[1:], self.groups)  # type: ignore[arg-type]

    def from_codes(
        self,
        codes: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        *_: Any,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        images, batch = self.gathered(codes), len(codes)
        added = None if into is None else into.transpose(1, 2).flatten(0, 1)
        if row_scale is not None:  # of a video, and so of each of its images
            row_scale = row_scale.flatten().repeat_interleave(len(images) // max(batch, 1))
        out = super().from_codes(images, dtype, added, row_scale=row_scale)
        return out.unflatten(0, (batch, -1)).transpose(1, 2)

    def gathered(self, codes: Tensor) -> Tensor:
        """Images (batch * frames out, channels * frames summed, height, width) of codes (batch, channels, frames, ...)."""
        before, after = self.sides[4:]
        (span, *_), (stride, *_), (dilation, *_) = self.kernel_size, self.stride, self.dilation
        codes = F.pad(codes, (0, 0, 0, 0, before, after), value=self.kernel_for_codes().code.zero_point)
        steps = (codes.shape[2] - dilation * (span - 1) - 1) // stride + 1
        first = torch.arange(steps, device=codes.device)[:, None] * stride
        picked = codes[:, :, first + torch.arange(span, device=codes.device) * dilation]
        images = picked.permute(0, 2, 4, 5, 1, 3).flatten(4).flatten(0, 1)
        return images.permute(0, 3, 1, 2)

    def convolve(self, *args: Any) -> Tensor:
        return F.conv3d(*args)


def channels_last(x: Tensor) -> Tensor:
    """An image as all that follows in integers reads it; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def plane(values: tuple[int, ...], first: int) -> tuple[int, int]:
    """The two numbers of a two-dimensional convolution; a one-dimensional one gets `first` for the unit dimension."""
    return (values[0], values[1]) if len(values) == 2 else (first, values[0])
