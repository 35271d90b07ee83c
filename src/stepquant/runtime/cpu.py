"""Integer convolutions and linears through oneDNN: bytes times signed bytes, summed in 32 bits, without error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from stepquant.runtime.reference import Code

KEPT_SHAPES = 2  # packed copies of one weight: a batch size that comes back is not packed again


@dataclass(frozen=True)
class Geometry:
    """How a two-dimensional convolution walks; `padding` is the same on both sides."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class PackedKernel(ABC):
    """A weight of signed bytes, packed for each input shape at the first call, and everything that stays the same.

    `weight` yields the signed bytes on demand, so that only the packed copies stay in memory.
    """

    def __init__(
        self,
        weight: Callable[[], Tensor],
        scales: Tensor,
        bias: Tensor | None,
        code: Code,
        geometry: Geometry,
    ) -> None:
        self.weight, self.scales, self.bias, self.code = weight, scales.contiguous(), bias, code
        self.geometry = geometry
        self.zeros = torch.zeros(scales.numel(), dtype=torch.int32)
        self.packed: dict[torch.Size, Tensor] = {}

    def packed_for(self, shape: torch.Size) -> Tensor:
        found = self.packed.get(shape)
        if found is None:
            if len(self.packed) >= KEPT_SHAPES:
                self.packed.pop(next(iter(self.packed)))
            found = self.packed[shape] = self.pack(shape)
        return found

    @abstractmethod
    def pack(self, shape: torch.Size) -> Tensor: ...

    @abstractmethod
    def __call__(self, codes: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """The layer's output for these codes, plus `into`."""


class ConvKernel(PackedKernel):
    """Codes (batch, channels, height, width), channels densest; the sum is written into what is added."""

    name = "onednn::qconv2d_pointwise"

    def pack(self, shape: torch.Size) -> Tensor:
        g, code = self.geometry, self.code
        # A hint of another shape may choose a layout that oneDNN reorders at every call.
        return torch.ops.onednn.qconv_prepack(
            self.weight(),
            self.scales,
            code.scale,
            code.zero_point,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            shape,
        )

    def __call__(self, codes: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        g, code, weight = self.geometry, self.code, self.packed_for(codes.shape)
        if into is None:
            return torch.ops.onednn.qconv2d_pointwise.default(
                codes, code.scale, code.zero_point, weight, self.scales, self.zeros, self.bias,
                g.stride, g.padding, g.dilation, g.groups, 1.0, 0, dtype, "none", [], "",
            )  # fmt: skip
        return torch.ops.onednn.qconv2d_pointwise.binary(
            codes, code.scale, code.zero_point, weight, self.scales, self.zeros, into, self.bias,
            g.stride, g.padding, g.dilation, g.groups, 1.0, 0, dtype, 1.0, 0, "sum", 1.0, "none", [], "",
        )  # fmt: skip


class LinearKernel(PackedKernel):
    """Codes (rows, inputs); what is added stays as it is."""

    name = "onednn::qlinear_pointwise"

    def pack(self, shape: torch.Size) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(self.weight(), shape)

    def __call__(self, codes: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        code, weight = self.code, self.packed_for(codes.shape)
        if into is None:
            return torch.ops.onednn.qlinear_pointwise.default(
                codes, code.scale, code.zero_point, weight, self.scales, self.zeros, self.bias,
                1.0, 0, dtype, "none", [], "",
            )  # fmt: skip
        return torch.ops.onednn.qlinear_pointwise.binary(
            codes, code.scale, code.zero_point, weight, self.scales, self.zeros, into, self.bias,
            1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], "",
        )  # fmt: skip


def joined(kernels: Sequence[LinearKernel]) -> LinearKernel:
    """One kernel for several that read the same codes; its outputs lie side by side."""
    biases = [torch.zeros_like(k.scales) if k.bias is None else k.bias for k in kernels]

    def weight() -> Tensor:
        return torch.cat([kernel.weight() for kernel in kernels])

    scales = torch.cat([kernel.scales for kernel in kernels])
    return LinearKernel(weight, scales, torch.cat(biases), kernels[0].code, kernels[0].geometry)


@cache
def why_no_integers() -> str | None:
    """None if u8 x s8 products are summed without error here; otherwise what stands in the way.

    Without VNNI the products are added in pairs in 16 bits, where 2 * 255 * 127 saturates.
    """
    width = 128
    codes, weight = (
        torch.full((16, width), 255, dtype=torch.uint8),
        torch.full((16, width), 127, dtype=torch.int8),
    )
    code, ones = Code(1.0, 0), torch.ones(16)
    try:
        linear = LinearKernel(lambda: weight, ones, None, code, Geometry())(codes, torch.float32)
        image = codes.reshape(16, width, 1, 1).to(memory_format=torch.channels_last)
        filters = weight.reshape(16, width, 1, 1)
        conv = ConvKernel(lambda: filters, ones, None, code, Geometry())(image, torch.float32)
    except (AttributeError, RuntimeError) as error:
        return f"this build of torch has no oneDNN integer kernels ({str(error).splitlines()[0][:80]})"
    if all((out == 255 * 127 * width).all() for out in (linear, conv)):
        return None
    return "u8 x s8 products saturate on this CPU (it has no VNNI)"
