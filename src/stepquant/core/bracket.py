"""Between which numbers a p-norm of quantization errors lies, at a fraction of what its powers cost."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepquant.core.affine import scale_and_zero
from stepquant.core.grid import Grid

CACHED = 1 << 17  # elements of rows that are looked at at once: nothing of it leaves the cache of a core
DEGREE = 4  # of the polynomial that stands in for |e|^p
HALF = 0.5  # of a step: no error is larger where nothing is clipped
# What rounding in float32 may add up to, as a share of the sum, and for each number as a share of the largest power.
LOOSE, LOOSE_EACH = 1e-3, 2e-4


@cache
def polynomial(p: float) -> tuple[tuple[float, ...], float]:
    """Coefficients c with c_0 + c_1 e + ... ~ e^p for e up to half a step, and how far they are off at most."""
    x = (1 - np.cos(np.linspace(0, np.pi, 4001))) / 2
    powers, weights = np.vander(x, DEGREE + 1, increasing=True), np.ones_like(x)
    best: Any = None
    off = np.inf
    for _ in range(50):  # least squares, weighted by what was off before
        fitted = np.linalg.lstsq(powers * weights[:, None], x**p * weights, rcond=None)[0]
        wrong = np.abs(powers @ fitted - x**p)
        best, off = (fitted, wrong.max()) if wrong.max() < off else (best, off)
        weights = weights * np.sqrt(wrong / wrong.max() + 1e-9)
    coefficients = best * HALF ** (p - np.arange(DEGREE + 1))
    return tuple(coefficients.tolist()), float(1.05 * off * HALF**p)


def bracket(
    rows: Tensor, outermost: Tensor, low: Tensor, high: Tensor, grid: Grid, p: float
) -> tuple[Tensor, Tensor]:
    """Two numbers for each row between which its sum of |x - Q(x)|^p lies, over this range.

    `outermost` are some of the row's values of the greatest magnitude; where others are clipped, the upper one is infinite.
    """
    scale, zero_point = scale_and_zero(low, high, grid)
    first, last = grid.qmin - zero_point, grid.qmax - zero_point
    (constant, *coefficients), off = polynomial(p)
    count = rows.shape[1]
    sums = powers(rows, scale, first, last)
    total = constant * count + torch.tensor(coefficients, device=rows.device) @ sums
    clipped = off_by(outermost, scale, first, last, *torch.empty((2, *outermost.shape), device=rows.device))
    total += (clipped.pow(p) - clipped.clamp(max=HALF).pow(p)).sum(1)
    loose = LOOSE * total.abs() + count * (off + LOOSE_EACH * HALF**p)
    reach = torch.minimum(HALF - first, last + HALF) * scale
    factor, tiny = scale.pow(p), torch.finfo(torch.float32).tiny
    # Beyond there float32 knows no more of them than that they are sums of powers.
    known = (factor >= tiny) & factor.isfinite()
    most = (total + loose) * factor + tiny
    all_seen = known & (outermost.abs().amin(1) <= reach)
    return torch.where(known, (total - loose) * factor, 0), torch.where(all_seen, most, torch.inf)


def powers(rows: Tensor, scale: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The sums of the first four powers of how many steps the numbers of each row lie from their nearest ones, at most a half."""
    few = max(CACHED // rows.shape[1], 1)
    memory = torch.empty((3, min(few, len(rows)), rows.shape[1]), device=rows.device)
    found = torch.empty((DEGREE, len(rows)), device=rows.device)
    for at in range(0, len(rows), few):
        some = slice(at, at + few)
        own, square, product = memory[:, : len(rows[some])]
        steps = off_by(rows[some], scale[some], first[some], last[some], own, square).clamp_(max=HALF)
        torch.mul(steps, steps, out=square)
        found[0, some], found[1, some] = steps.sum(1), square.sum(1)
        found[2, some] = torch.mul(steps, square, out=product).sum(1)
        found[3, some] = torch.mul(square, square, out=product).sum(1)
    return found


def off_by(x: Tensor, scale: Tensor, first: Tensor, last: Tensor, out: Tensor, other: Tensor) -> Tensor:
    """How many steps each number lies from its nearest one, in `out`; `other` is memory that may be written to."""
    torch.mul(x, scale.reciprocal()[:, None], out=other)
    torch.round(other, out=out)
    torch.maximum(out, first[:, None], out=out)  # `clamp` between tensors takes twenty times as long
    torch.minimum(out, last[:, None], out=out)
    return out.sub_(other).abs_()
