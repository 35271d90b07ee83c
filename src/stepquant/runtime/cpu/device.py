"""The processor, with this package's own kernels and oneDNN's."""

from __future__ import annotations

import torch

from stepquant.runtime import ops
from stepquant.runtime.cpu.products import ConvKernel, LinearKernel, why_no_integers
from stepquant.runtime.device import Device
from stepquant.runtime.kernel import Geometry


def why_no_convolution(_: torch.device, geometry: Geometry) -> str | None:
    return why_no_integers(geometry.groups)


def why_no_linear(_: torch.device) -> str | None:
    return why_no_integers(1)


def why_no_attention(_: torch.device) -> str | None:
    if ops.compiled():
        return None
    return "the compiled attention kernel is missing: the codes are multiplied in float32"


# Beyond so many, a weight that is dequantized first repays it.
STORED_ROWS = 16

OPERATIONS = tuple(name for kind in (ConvKernel, LinearKernel) for name in (kind.own_name, kind.name))
DEVICE = Device(
    ConvKernel,
    LinearKernel,
    why_no_convolution,
    why_no_linear,
    why_no_attention,
    (*OPERATIONS, "stepquant::attention", "stepquant::attention_by_row"),
    STORED_ROWS if ops.compiled() else 0,
)
