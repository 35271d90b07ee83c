"""Convolutions that hold packed integers and multiply with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.runtime.device import device_for
from stepquant.runtime.kernel import Geometry, Kernel
from stepquant.runtime.layers.layer import IntegerLayer


class IntegerConv2d(IntegerLayer):
    """A convolution whose border is padded with the input's zero point, which is what a float zero becomes."""

    outputs_dim = 1

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, spec: LayerSpec, groups: int = 1) -> None:
        super().__init__(layer, spec, groups)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        # (left, right, top, bottom): the order of F.pad, last dimension first
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

    def from_codes(self, codes: Tensor, dtype: torch.dtype, into: Tensor | None = None, *walk: Any) -> Tensor:
        kernel = self.kernel_for_codes()
        return kernel(codes, dtype, into, *(walk if self.even else ((*self.sides, 0, 0)[:4],)))

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

    def from_codes(self, codes: Tensor, dtype: torch.dtype, into: Tensor | None = None, *_: Any) -> Tensor:
        rows = None if into is None else into.unsqueeze(2)
        return super().from_codes(codes.unsqueeze(2), dtype, rows).squeeze(2)

    def convolve(self, *args: Any) -> Tensor:
        return F.conv1d(*args)


class IntegerConv3d(IntegerConv2d):
    """A convolution over videos, run over images where its taps lie within a frame, or within a pixel's time."""

    @property
    def within_frames(self) -> bool:
        return (self.kernel_size[0], self.stride[0], *self.sides[4:]) == (1, 1, 0, 0)

    @property
    def within_pixels(self) -> bool:
        return (*self.kernel_size[1:], *self.stride[1:], *self.sides[:4]) == (1, 1, 1, 1, 0, 0, 0, 0)

    def why_no_kernel(self) -> str | None:
        if not self.even or not (self.within_frames or self.within_pixels):
            return "no integer kernel for taps in all three dimensions"
        return super().why_no_kernel()

    def geometry(self) -> Geometry:
        """Of the frames, or of the images of pixels by time, in which the second dimension has one tap."""
        padding = self.sides[::-2]
        if self.within_frames:
            return Geometry(self.stride[1:], padding[1:], self.dilation[1:], self.groups)  # type: ignore[arg-type]
        return Geometry((self.stride[0], 1), (padding[0], 0), (self.dilation[0], 1), self.groups)

    def kernel_weight(self) -> Tensor:
        weight = super().kernel_weight()
        return weight.squeeze(2) if self.within_frames else weight.squeeze(-1)

    def from_codes(self, codes: Tensor, dtype: torch.dtype, into: Tensor | None = None, *_: Any) -> Tensor:
        images = self.images(codes)
        out = super().from_codes(images, dtype, None if into is None else self.images(into))
        if self.within_frames:
            return out.unflatten(0, (codes.shape[0], codes.shape[2])).transpose(1, 2)
        return out.unflatten(-1, codes.shape[-2:])

    def images(self, x: Tensor) -> Tensor:
        """Videos as a batch of frames, or as images of pixels by time."""
        return channels_last(x.transpose(1, 2).flatten(0, 1) if self.within_frames else x.flatten(3))

    def convolve(self, *args: Any) -> Tensor:
        return F.conv3d(*args)


def channels_last(x: Tensor) -> Tensor:
    """An image as all that follows in integers reads it; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def plane(values: tuple[int, ...], first: int) -> tuple[int, int]:
    """The two numbers of a two-dimensional convolution; a one-dimensional one gets `first` for the unit dimension."""
    return (values[0], values[1]) if len(values) == 2 else (first, values[0])
