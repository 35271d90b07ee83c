"""Scales of activations as smooth functions of t: a small network for each, which nobody has to ask at run time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from stepquant.calib.calibset import CalibSet
from stepquant.core.affine import fake_quantize_ste, quantize, scale_and_zero
from stepquant.core.codebook import BYTES
from stepquant.core.grid import Grid
from stepquant.core.ranges import lp_error
from stepquant.core.slices import Slices
from stepquant.core.steps import StepTable
from stepquant.errors import CalibrationError, MethodError
from stepquant.fit.ranges import observe_all
from stepquant.progress import Progress
from stepquant.quant.insert import Inserted
from stepquant.quant.quantizer import Quantizer

BINS = 2048  # eight for each step of the widest grid
FREQUENCIES, LONGEST = 32, 10000.0  # of the features of t, and the longest wave
WIDTH, LAYERS = 64, 4
LARGEST = 1000.0  # what the greatest t becomes, so that features know its scale
CANDIDATES = 40  # of the first scale, which learning moves
AT_ONCE = 1 << 21  # values whose errors are found together
ONE = math.log(math.expm1(1.0))  # whose softplus is 1


@dataclass(frozen=True, eq=False)
class Seen:
    """What one activation was in one call, all of whose records are of one step: a histogram over its own range."""

    row: int  # of the table of steps
    centres: Tensor  # (bins,)
    mass: Tensor  # share of the values in each

    @classmethod
    def of(cls, values: Slices, row: int, where: object) -> Seen:
        low, high = values.ends
        if not (low.isfinite().all() and high.isfinite().all()):
            raise CalibrationError(
                f"activations are not finite at '{where}'",
                fix="keep this layer, or the one before it, in float with a plan rule",
            )
        if low == high:
            return cls(row, low, torch.ones_like(low))
        centres = low + (torch.arange(BINS, device=low.device) + 0.5) * ((high - low) / BINS)
        return cls(row, centres, (values.histogram(BINS) / values.count).float())


def seen_by_step(
    network: Inserted, data: CalibSet, table: StepTable, batch: int, progress: Progress
) -> dict[Quantizer, list[Seen]]:
    """What every activation with a range was at every step that was recorded, behind quantized weights."""
    found: dict[Quantizer, list[Seen]] = {quantizer: [] for quantizer in network.ranged()}
    times = torch.cat([records.arguments[data.t].reshape(-1) for records in data.batches(256)])
    rows = table.rows_of(times)
    network.switch(weights=True, inputs=False)
    for row in rows.unique().tolist():
        mine = data.subset((rows == row).nonzero().flatten().tolist())
        observe_all(network, mine, list(found), noting(row, found), batch, progress, "activations by step")
    unseen = [quantizer for quantizer, seen in found.items() if not seen]
    if unseen:
        raise MethodError(
            f"'{unseen[0].site}' never ran during calibration",
            got=f"{len(unseen)} quantizers without a range",
            fix="keep these layers in float with a plan rule",
        )
    return found


def set_codebooks(quantizer: Quantizer, seen: Sequence[Seen]) -> None:
    """For what was seen at every step, where the activation has them; at a step that was not recorded, of all steps."""
    if not quantizer.grid.codebook:
        return
    for row, (scale, zero_point) in enumerate(zip(*quantizer.range())):
        counts = torch.zeros(BYTES, dtype=torch.float64)
        for one in [one for one in seen if one.row == row] or seen:
            q = quantize(one.centres, scale, zero_point, quantizer.grid).cpu()
            counts.index_add_(0, q.int(), one.mass.double().cpu())
        quantizer.set_codebook(counts, row)


def noting(row: int, found: dict[Quantizer, list[Seen]]) -> Callable[[Quantizer, Slices], None]:
    def observe(quantizer: Quantizer, values: Slices) -> None:
        found[quantizer].append(Seen.of(values, row, quantizer.site))

    return observe


@dataclass(frozen=True, eq=False)
class Stacked:
    """All that was seen of one activation."""

    rows: Tensor  # (calls,)
    centres: Tensor  # (calls, bins)
    mass: Tensor

    @classmethod
    def of(cls, seen: Sequence[Seen]) -> Stacked:
        bins = max(len(one.centres) for one in seen)

        def filled(x: Tensor) -> Tensor:
            return F.pad(x, (0, bins - len(x)))  # of no mass

        return cls(
            torch.tensor([one.row for one in seen]),
            torch.stack([filled(one.centres) for one in seen]),
            torch.stack([filled(one.mass) for one in seen]),
        )

    def of_rows(self, chosen: Tensor) -> Stacked:
        """What was seen at those steps alone."""
        mine = chosen.to(self.rows.device)[self.rows]
        return Stacked(self.rows[mine], *(x[mine.to(x.device)] for x in (self.centres, self.mass)))

    def coarser(self, bins: int) -> Stacked:
        """So many neighbouring bins as one."""
        if self.mass.shape[1] % bins:
            return self
        mass = self.mass.unflatten(1, (-1, bins))
        middle = (self.centres.unflatten(1, (-1, bins)) * mass).sum(2) / mass.sum(2).clamp(min=1e-30)
        return Stacked(self.rows, middle, mass.sum(2))

    def one_range(self, grid: Grid, p: float) -> tuple[Tensor, Tensor]:
        """Scale and zero point of least p-norm error over all steps."""
        low, high = self.centres.min(), self.centres.max()
        fractions = torch.arange(CANDIDATES, 0, -1, device=low.device) / CANDIDATES
        several = max(AT_ONCE // self.centres.numel(), 1)
        errors = torch.cat([self.lp_errors(low, high, some, grid, p) for some in fractions.split(several)])
        best = fractions[errors.argmin()]
        return scale_and_zero((low * best).reshape(1), (high * best).reshape(1), grid)

    def lp_errors(self, low: Tensor, high: Tensor, fractions: Tensor, grid: Grid, p: float) -> Tensor:
        """Of each of these fractions of a range, over all calls."""
        parts = fractions.repeat_interleave(len(self.centres))
        rows = [x.repeat(len(fractions), 1) for x in (self.centres, self.mass)]
        return lp_error(rows[0], low * parts, high * parts, grid, p, rows[1]).view(len(fractions), -1).sum(1)

    def error(self, scales: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        """Mean squared error of every call, for one scale each."""
        return self.errors(scales[:, None], zero_point, grid)

    def errors(self, scales: Tensor, zero_points: Tensor, grid: Grid) -> Tensor:
        """The same for ranges that are laid against (calls, bins)."""
        rounded = fake_quantize_ste(self.centres, scales, zero_points, grid)
        return ((rounded - self.centres).square() * self.mass).sum(-1)


def features(times: Tensor) -> Tensor:
    """sin and cos of t over geometrically growing waves, (times, 2 FREQUENCIES)."""
    scaled = times.double() * (LARGEST / times.double().abs().max().clamp(min=1e-12))
    waves = LONGEST ** (torch.arange(FREQUENCIES, dtype=torch.float64) / FREQUENCIES)
    angles = scaled[:, None].cpu() / waves
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def network_of(generator: Generator) -> nn.Sequential:
    """Rectified linears with He's initialisation; the last one says nothing of t yet."""
    widths = [2 * FREQUENCIES, *[WIDTH] * (LAYERS - 1), 1]
    linears = [skip_init(nn.Linear, a, b) for a, b in pairwise(widths)]
    for linear in linears:
        nn.init.normal_(linear.weight, std=math.sqrt(2 / linear.in_features), generator=generator)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(linears[-1].weight)
    nn.init.constant_(linears[-1].bias, ONE)
    return nn.Sequential(*[part for linear in linears for part in (linear, nn.ReLU())][:-1])


def learn_scales(
    seen: Sequence[Seen],
    grid: Grid,
    known: Tensor,
    *,
    p: float,
    iterations: int,
    rate: float,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """A scale for each of the features of `known`, and the zero point of all of them.

    The network begins with the best scale for all steps, and goes down the gradient of rounding (straight-through).
    """
    found = Stacked.of(seen)
    start, zero_point = found.one_range(grid, p)
    before = found.error(start.expand(len(found.rows)), zero_point, grid).mean().clamp(min=1e-30)
    network, known = network_of(generator).to(start.device), known.to(start.device)
    adam = torch.optim.Adam(network.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(iterations, 1))

    def scales() -> Tensor:
        return start * F.softplus(network(known).flatten())

    with torch.enable_grad():
        for _ in range(iterations):
            adam.zero_grad()
            loss = found.error(scales()[found.rows], zero_point, grid).mean() / before
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            decay.step()
    with torch.no_grad():
        return scales(), zero_point
