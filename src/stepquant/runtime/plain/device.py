"""Linears by torch's own GEMM of signed bytes, where the device has it; all else in the model's float type."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.runtime.device import Device
from stepquant.runtime.kernel import Geometry, Kernel, gated
from stepquant.runtime.ops.products import epilogue

# torch._int_mm on CUDA takes more than 16 rows, and widths in multiples of 8.
ROWS, WIDTH = 17, 8


class Linear(Kernel):
    """`torch._int_mm` takes signed bytes: 128 is subtracted from every code, and its share, 128 - zero point times the sum of
    each row of the weight, is added to the sums."""

    def multiply(  # type: ignore[override]
        self,
        codes: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        gate: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        if gate is not None:
            return gated(self.multiply(codes, torch.float32, None, None, row_scale), gate, into, dtype)
        rows, outs = len(codes), len(self.scales)
        weight, sums = self.packed_once()
        signed = (codes ^ 128).view(torch.int8)
        signed = F.pad(signed, (0, -codes.shape[1] % WIDTH, 0, max(ROWS - rows, 0)))
        products = torch._int_mm(signed, weight)[:rows, :outs] + (128 - self.code.zero_point) * sums
        rows_of = row_scale if row_scale is None else row_scale.reshape(-1, 1)
        return epilogue(
            products, self.code.scale, self.scales, self.bias, dtype, into, (1, -1), None, rows_of
        )

    def packed_once(self) -> tuple[Tensor, Tensor]:
        if not self.packed:
            weight = self.weight()
            outs, ins = weight.shape
            self.packed["weight"] = F.pad(weight, (0, -ins % WIDTH, 0, -outs % WIDTH)).t()
            self.packed["sums"] = weight.sum(1, dtype=torch.int32)
        return self.packed["weight"], self.packed["sums"]


def why_no_convolution(device: torch.device, _: Geometry) -> str:
    return f"no integer convolution on device '{device.type}'"


def why_no_attention(device: torch.device) -> str:
    return f"no integer attention on device '{device.type}': the codes are multiplied in float32"


@cache
def why_no_linear(device: torch.device) -> str | None:
    """None if the device multiplies signed bytes without error."""
    sides = (ROWS, WIDTH), (WIDTH, WIDTH)
    low, high = (
        torch.full(side, number, dtype=torch.int8, device=device) for side, number in zip(sides, (-128, 127))
    )
    try:
        out = torch._int_mm(low, high)
    except RuntimeError as error:  # also what says that there is no such kernel
        return f"torch._int_mm does not run on device '{device.type}' ({str(error).splitlines()[0][:80]})"
    if bool((out == -128 * 127 * WIDTH).all()):
        return None
    return f"torch._int_mm errs on device '{device.type}'"


DEVICE = Device(None, Linear, why_no_convolution, why_no_linear, why_no_attention, ("aten::_int_mm",))
