"""Between which numbers the values of a stored tensor lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.core.entries import AGAIN
from stepquant.core.grid import Grid
from stepquant.errors import ArtifactError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Bounds:
    """The least and the most, both allowed; NaN lies nowhere."""

    low: float
    high: float
    words: str


LIMITS = torch.finfo(torch.float32)
FINITE = Bounds(LIMITS.min, LIMITS.max, "finite numbers")
# Below this the reciprocal, with which inputs are scaled, is infinite.
SCALE = Bounds(LIMITS.tiny, LIMITS.max, "finite numbers above 0")
VARIANCE = Bounds(0, LIMITS.max, "finite numbers from 0 on")
BYTES = Bounds(0, 255, "bytes")
TIMES = Bounds(
    torch.finfo(torch.float64).min,
    torch.finfo(torch.float64).max,
    "the bits of finite numbers, all different",
)


def zero_points(grid: Grid) -> Bounds:
    """The integers that can stand for zero."""
    low, high = (0, 0) if grid.symmetric else (grid.qmin, grid.qmax)
    return Bounds(low, high, f"whole numbers from {low} to {high}, the zero points of {grid}")


def check_values(found: Mapping[str, Tensor], bounds: Mapping[str, Bounds], where: str) -> None:
    """Every tensor keeps within its bounds; one without any is a float that has to be finite."""
    for name, value in found.items():
        bound = bounds.get(name, FINITE)
        if not value.numel() or value.is_meta:
            continue
        value = value.detach().view(torch.float64) if bound is TIMES else value.detach()
        least, most = (edge.item() for edge in torch.aminmax(value))
        repeated = bound is TIMES and len(value.unique()) < len(value)
        if repeated or not (bound.low <= least and most <= bound.high):  # so that NaN fails
            raise ArtifactError(
                f"tensor '{name}' holds values that cannot be",
                where=where,
                got=f"{least:g} to {most:g}",
                expected=bound.words,
                fix=AGAIN,
            )


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, packed: Mapping[str, Bounds]
) -> None:
    """Every expected tensor is there in its shape and dtype, and none besides; what is not packed may be any float."""
    check_names(found, expected, where)
    for name, value in found.items():
        wanted = expected[name]
        floats = name not in packed and value.dtype in FLOATS and wanted.dtype in FLOATS
        for what, got, need in (
            ("shape", tuple(value.shape), tuple(wanted.shape)),
            ("dtype", wanted.dtype if floats else value.dtype, wanted.dtype),
        ):
            if got != need:
                raise ArtifactError(
                    f"tensor '{name}' has the wrong {what}", where=where, got=got, expected=need, fix=AGAIN
                )


def check_names(found: Mapping[str, object], expected: Mapping[str, object], where: str) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        name = (missing or extra)[0]
        raise ArtifactError(
            f"tensor '{name}' is {'missing from' if missing else 'foreign to'} the artifact",
            where=where,
            got=f"{len(missing)} missing, {len(extra)} extra",
            fix=AGAIN,
        )
