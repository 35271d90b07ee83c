"""What the layers ask of a device. One folder beside this file is one device, by the name that torch gives it.

A device without a folder takes the plain one: slower, and the same numbers within one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from stepquant.runtime.kernel import Geometry, Kernel


@dataclass(frozen=True)
class Device:
    """Kernels for codes of images and of rows, and what stands in their way."""

    convolution: type[Kernel] | None  # codes (batch, channels, height, width)
    linear: type[Kernel]  # codes (rows, inputs)
    why_no_convolution: Callable[[torch.device, Geometry], str | None]
    why_no_linear: Callable[[torch.device], str | None]
    why_no_attention: Callable[[torch.device], str | None]
    operations: tuple[str, ...]  # of torch's dispatcher, that multiply integers
    stored_rows: int = 0  # as many rows of floats at most are multiplied with a weight as it is stored


def device_for(device: torch.device) -> Device:
    return found(device.type if find_spec(f"{__package__}.{device.type}") else "plain")


def operations() -> tuple[str, ...]:
    """Those of all devices that multiply integers."""
    folders = [path.parent.name for path in Path(__file__).parent.glob("*/device.py")]
    return tuple(name for folder in sorted(folders) for name in found(folder).operations)


@cache
def found(folder: str) -> Device:
    return import_module(f"{__package__}.{folder}.device").DEVICE  # type: ignore[no-any-return]
