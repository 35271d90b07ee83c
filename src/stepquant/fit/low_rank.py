"""Divide linears into integers and a branch of few directions in 16 bits, behind inputs whose channels were balanced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stepquant.core.affine import fake_quantize, scales_of_rows, to_groups
from stepquant.core.levels import rounded_over
from stepquant.core.low_rank import LowRank, balance, divide, nearest
from stepquant.core.ranges import Search
from stepquant.errors import CalibrationError, MethodError
from stepquant.fit.compensate import calls, run_until
from stepquant.fit.learner import Learner, Sample, Schedule, inside
from stepquant.fit.reconstruct import Report
from stepquant.fit.streams import Piece
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer


@dataclass(frozen=True)
class Division:
    """How a linear is divided."""

    weight_search: Search
    input_search: Search
    rank: int = 32  # 0: no branch
    rounds: int = 5  # of branch and rounding in turns
    grid: int = 20  # strengths of balancing that are tried; 0: inputs stay as they are
    rows: int = 2048  # of the inputs, by which errors are measured
    without: tuple[str, ...] = ()  # roles whose layers stay as they are
    batch: int = 32


@dataclass(frozen=True)
class Choice:
    """One way to divide a layer, and its error."""

    error: float
    factors: Tensor | None = None
    branch: LowRank | None = None


def divisible(layers: Mapping[str, QuantLayer], without: tuple[str, ...]) -> dict[str, QuantLayer]:
    """The linears among these layers whose weights are quantized, but for those of some roles."""
    return {
        path: layer
        for path, layer in layers.items()
        if layer.weight_quantizer is not None
        and isinstance(layer.layer, nn.Linear)
        and layer.role not in without
    }


def check_divisible(network: Inserted, settings: Division) -> None:
    """There is something to divide, and every linear has as many directions as are asked for."""
    found = divisible(network.layers, settings.without)
    if not found:
        raise MethodError(
            "there is no linear to divide into integers and a low-rank branch",
            got=f"{len(network.layers)} quantized layers: convolutions, or roles {', '.join(settings.without)}",
            expected="linears of attentions or feed-forwards",
            fix="choose another method, as gptq",
        )
    path, layer = min(found.items(), key=lambda one: min(one[1].weight.shape))
    if settings.rank > min(layer.weight.shape):
        outputs, inputs = layer.weight.shape
        raise MethodError(
            f"a branch of rank {settings.rank} is wider than '{path}'",
            got=f"{inputs} inputs, {outputs} outputs",
            expected=f"a rank of at most {min(outputs, inputs)}",
            fix=f"--set rank={max(min(outputs, inputs) // 4, 1)}, or keep the layer in float with a plan rule",
        )


@torch.no_grad()
def divide_block(network: Inserted, piece: Piece, sample: Sample, seed: int, settings: Division) -> Report:
    """Divide every linear of `piece` in the order of their calls, each behind the layers already divided."""
    measure = Learner(network, piece, Schedule(0, settings.batch, rounding_rate=0), Generator())
    before = measure.held_loss(sample)
    layers = divisible(inside(network.layers, *piece.covers), settings.without)
    generator = Generator().manual_seed(seed)
    for path in calls(piece, layers, sample) if layers else ():
        layer, seen = layers[path], Inputs(settings.rows, len(sample.train))
        for rows in sample.train.split(settings.batch):
            run_until(piece, layer, sample.quants.take(rows), seen.add)
        choice = best_division(layer, seen, settings, generator, path)
        layer.divide(choice.factors, choice.branch)
        set_range(layer, settings.weight_search)
    after = measure.held_loss(sample) if layers else before
    return Report(piece.path, before, after, after, len(layers))


def set_range(layer: QuantLayer, search: Search) -> None:
    """Of the weight that is left for the integers."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    quantizer.fit(to_groups(layer.weight.detach().float(), quantizer.grid), search)


class Inputs:
    """Rows that a layer reads, evenly chosen, and the greatest magnitude of each channel over all of them."""

    def __init__(self, rows: int, records: int) -> None:
        self.wanted, self.records = rows, records
        self.kept: list[Tensor] = []
        self.greatest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Of some of the records."""
        rows = x.detach().float().flatten(0, -2)
        most = rows.abs().amax(0)
        self.greatest = most if self.greatest is None else torch.maximum(self.greatest, most)
        few = max(self.wanted * len(x) // self.records, 1)
        self.kept.append(rows[:: max(len(rows) // few, 1)])

    def rows(self) -> Tensor:
        return torch.cat(self.kept)


def best_division(
    layer: QuantLayer, seen: Inputs, settings: Division, generator: Generator, path: str
) -> Choice:
    """The division whose output errs least on these inputs; none where plain rounding errs no more."""
    quantizer, weight, x = layer.weight_quantizer, layer.weight.detach().float(), seen.rows()
    assert quantizer is not None
    assert seen.greatest is not None
    if not seen.greatest.isfinite().all():
        raise CalibrationError(
            f"the inputs of '{path}' are not finite, and cannot be balanced",
            fix="keep this layer, or the one before it, in float with a plan rule",
        )
    target = F.linear(x, weight)

    def rounded(rest: Tensor) -> Tensor:
        trial, rows = Quantizer(quantizer.grid, quantizer.site), to_groups(rest, quantizer.grid)
        trial.fit(rows, settings.weight_search)
        return trial.levels.values(rows).view_as(rest)

    def measured(factors: Tensor | None) -> Callable[[LowRank | None, Tensor], float]:
        inputs = rounded_inputs(layer.input_quantizer, x if factors is None else x * factors, settings)

        def error(branch: LowRank | None, rest: Tensor) -> float:
            out = F.linear(inputs, rest)
            lacks = (out - target if branch is None else out + branch(x) - target).square().mean()
            return float(lacks.nan_to_num(torch.inf))

        return error

    def attempt(factors: Tensor | None) -> Choice:
        scaled = weight if factors is None else weight / factors
        if not settings.rank:
            return Choice(measured(factors)(None, rounded(scaled)), factors)
        branch, dense = nearest(scaled, settings.rank, generator, factors)
        return Choice(measured(factors)(branch, rounded(scaled - dense)), factors, branch)

    plain = Choice(measured(None)(None, rounded(weight)))
    found = [attempt(factors) for factors in balances(seen.greatest, weight, settings.grid, path)]
    best = min(found, key=lambda choice: choice.error)
    if settings.rank:
        factors = best.factors
        branch, error = divide(
            weight if factors is None else weight / factors,
            settings.rank,
            generator,
            rounds=settings.rounds,
            rounded=rounded,
            error=measured(factors),
            factors=factors,
        )
        best = Choice(error, factors, branch)
    return min(best, plain, key=lambda choice: choice.error)


def balances(greatest: Tensor, weight: Tensor, grid: int, path: str) -> Iterator[Tensor | None]:
    """Inputs as they are, and balanced by strengths alpha = i / grid, with beta = 0 or 1 - alpha."""
    yield None
    strengths = [(i / grid, beta) for i in range(1, grid + 1) for beta in (0.0, 1 - i / grid)]
    for alpha, beta in dict.fromkeys(strengths):
        yield finite_factors(greatest, weight, alpha, beta, path)


def finite_factors(greatest: Tensor, weight: Tensor, alpha: float, beta: float, path: str) -> Tensor:
    """Of the inputs of a linear; what no number can balance is an error."""
    factors = balance(greatest, weight, alpha, beta)
    if not (factors.isfinite().all() and (factors > 0).all()):
        raise CalibrationError(
            f"no finite factors balance the inputs of '{path}'",
            got=f"{factors.min().item():g} to {factors.max().item():g}",
            fix="keep this layer, or the one before it, in float with a plan rule",
        )
    return factors


def rounded_inputs(quantizer: Quantizer | None, x: Tensor, settings: Division) -> Tensor:
    """`x` on the grid of its quantizer, with the range that these values would give it."""
    if quantizer is None:
        return x
    grid = quantizer.grid
    if quantizer.dynamic:
        scale = scales_of_rows(x, -1, grid.qmax)
        return fake_quantize(x, scale, torch.zeros_like(scale), grid)
    return rounded_over(x, *settings.input_search(x.reshape(1, -1), grid), grid)
