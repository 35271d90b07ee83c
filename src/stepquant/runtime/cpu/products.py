"""Integer convolutions and linears: bytes times signed bytes, summed in 32 bits, without error.

They run in this package's own kernels, which start sooner and never saturate; without the extension, and with groups,
in oneDNN's, if those give the same sums on this processor.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.kernel import Geometry, Kernel, gated
from stepquant.runtime.ops.code import Code

KEPT_SHAPES = 2  # packed copies of one weight: a batch size that comes back is not packed again
# Where oneDNN has tiles, four times as fast as vectors, more products than these repay its slower start.
FEW_WITH_TILES = 16_000_000


class PackedKernel(Kernel):
    """Products in this package's kernels, or in oneDNN's."""

    name: str  # of oneDNN's operation
    own_name: str  # of this package's

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.zeros = torch.zeros(self.scales.numel(), dtype=torch.int32)
        self.products: list[ops.Product | None] = []  # at most one, shared with every twin

    @property
    def leaves_added(self) -> bool:  # type: ignore[override]
        return self.product is not None

    def packed_for(self, shape: torch.Size) -> Tensor:
        key = (shape, self.code.zero_point == 0)  # a layout is chosen with or without room for zero points
        found = self.packed.get(key)
        if found is None:
            if len(self.packed) >= KEPT_SHAPES:
                self.packed.pop(next(iter(self.packed)))
            found = self.packed[key] = self.pack(shape)
        return found

    @property
    def product(self) -> ops.Product | None:
        """The weight for the own kernel, which leaves what it adds as it was; None where it cannot take this layer."""
        if not self.products:
            self.products.append(self.make_product() if ops.compiled() else None)
        return self.products[0]

    def make_product(self) -> ops.Product | None:
        if self.geometry.groups > 1:
            return None
        weight = self.weight()
        image = weight if weight.dim() == 4 else weight[:, :, None, None]
        return ops.Product.of(image, self.scales, self.bias)

    def without_bias(self) -> Self:
        """The same weight in the same packed copies."""
        twin = copy.copy(self)
        twin.bias = None
        return twin

    @abstractmethod
    def pack(self, shape: torch.Size) -> Tensor: ...


class ConvKernel(PackedKernel):
    """Codes (batch, channels, height, width), channels densest."""

    name, own_name = "onednn::qconv2d_pointwise", "stepquant::convolve"

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

    def multiply(  # type: ignore[override]
        self,
        codes: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        row_scale: Tensor | None = None,
        border: Sequence[int] | None = None,
        doubled: bool = False,
    ) -> Tensor:
        """The convolution, each image times its scale, plus `into`, after doubling every pixel and adding a border
        (left, right, top, bottom)."""
        g, product = self.geometry, self.product
        high, wide = g.padding
        left, right, top, bottom = border or (0, 0, 0, 0)
        if product is not None and not better_with_tiles(codes, product):
            sides = (left + wide, right + wide, top + high, bottom + high)
            return product.convolve(
                codes, self.code, dtype, into, g.stride, sides, g.dilation, doubled, row_scale
            )
        codes = ops.upsample_nearest2x(codes) if doubled else codes
        codes = codes if border is None else F.pad(codes, list(border), value=self.code.zero_point)
        codes = codes.contiguous(memory_format=torch.channels_last)
        if row_scale is not None:
            sums = self.without_bias().onednn(codes, torch.float32, None)
            return scaled(sums, row_scale.reshape(-1, 1, 1, 1), self.bias, 1, into, dtype)
        if into is not None:
            into = into.contiguous(memory_format=torch.channels_last)
            into = into if product is None else into.clone()  # oneDNN writes into it
        return self.onednn(codes, dtype, into)

    def onednn(self, codes: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
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
    """Codes (rows, inputs)."""

    name, own_name = "onednn::qlinear_pointwise", "stepquant::linear"

    def pack(self, shape: torch.Size) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(self.weight(), shape)

    def adds_branch(self, codes: Tensor) -> bool:
        return self.product is not None and not better_with_tiles(codes, self.product)

    def multiply(  # type: ignore[override]
        self,
        codes: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        gate: Tensor | None = None,
        row_scale: Tensor | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The product, each row times its scale, plus what a branch adds, if it may, times `gate`, plus `into`, which stays
        as it is."""
        product = self.product
        if product is not None and not better_with_tiles(codes, product):
            return product.linear(codes, self.code, dtype, into, gate, row_scale, *(branch or ()))
        if gate is not None:
            return gated(self.multiply(codes, torch.float32, None, None, row_scale), gate, into, dtype)
        if row_scale is not None:
            sums = self.without_bias().multiply(codes, torch.float32)
            return scaled(sums, row_scale.reshape(-1, 1), self.bias, -1, into, dtype)
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


def scaled(
    sums: Tensor, scales: Tensor, bias: Tensor | None, channels: int, into: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What products do in their epilogue, where that is oneDNN's."""
    if into is None:
        return ops.scale_rows(sums, scales, bias, channels, dtype)
    return (ops.scale_rows(sums, scales, bias, channels, torch.float32) + into.to(dtype).float()).to(dtype)


def better_with_tiles(codes: Tensor, product: ops.Product) -> bool:
    pixels = codes.numel() // codes.shape[1]
    return ops.capability() == "amx" and pixels * product.weight.numel() > FEW_WITH_TILES


def why_no_integers(groups: int) -> str | None:
    """None if products in so many groups are summed without error here; otherwise what stands in the way."""
    if ops.compiled() and groups == 1:
        return None
    reason = why_not_onednn()
    return f"{reason}, and own kernels take no groups" if reason and ops.compiled() else reason


@cache
def why_not_onednn() -> str | None:
    """None if oneDNN sums u8 x s8 products without error here.

    Without VNNI it adds them in pairs in 16 bits, where 2 * 255 * 127 saturates.
    """
    width = 128
    codes, weight = (
        torch.full((16, width), 255, dtype=torch.uint8),
        torch.full((16, width), 127, dtype=torch.int8),
    )
    code, ones = Code(1.0, 0), torch.ones(16)
    linear = LinearKernel(lambda: weight, ones, None, code, Geometry())
    conv = ConvKernel(lambda: weight.reshape(16, width, 1, 1), ones, None, code, Geometry())
    linear.products = conv.products = [None]
    image = codes.reshape(16, width, 1, 1).to(memory_format=torch.channels_last)
    try:
        outs = (linear(codes, torch.float32), conv(image, torch.float32))
    except (AttributeError, RuntimeError) as error:
        return f"this build of torch has no oneDNN integer kernels ({str(error).splitlines()[0][:80]})"
    if all((out == 255 * 127 * width).all() for out in outs):
        return None
    return "oneDNN's u8 x s8 products saturate on this CPU (it has no VNNI)"
