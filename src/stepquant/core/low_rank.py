"""Low rank: the few directions that carry most of a weight, taken out of it before it is rounded (arXiv:2411.05007)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

STORED = torch.float16
EXACT = 256  # up to this width all directions are found, and beyond it only those that are wanted
MORE, POWERS = 8, 3  # directions besides those wanted, and products with the weight that sort them out


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix `up @ down`, in 16 bits."""

    down: Tensor  # (rank, inputs)
    up: Tensor  # (outputs, rank)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def dense(self) -> Tensor:
        return self.up.float() @ self.down.float()


def nearest(
    weight: Tensor, rank: int, generator: Generator, factors: Tensor | None = None
) -> tuple[LowRank, Tensor]:
    """The matrix of this rank that is nearest to `weight`, for inputs that nobody has multiplied by `factors` yet.

    With it comes the matrix for inputs that were, as its 16 bits have it.
    """
    down, up = directions(weight.float(), rank, generator)
    sides = (down if factors is None else down * factors), up
    own = LowRank(*(side.to(STORED).contiguous() for side in sides))
    return own, own.dense() if factors is None else own.dense() / factors


def directions(weight: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """(rank, inputs) and (outputs, rank), singular values shared evenly between both; random numbers decide no more than
    the last digits."""
    if min(weight.shape) <= max(EXACT, 2 * (rank + MORE)):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        start = torch.randn(weight.shape[1], rank + MORE, generator=generator).to(weight)
        basis, _ = torch.linalg.qr(weight @ start)
        for _ in range(POWERS):
            basis, _ = torch.linalg.qr(weight.T @ basis)
            basis, _ = torch.linalg.qr(weight @ basis)
        inner, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        left = basis @ inner
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def divide(
    weight: Tensor,
    rank: int,
    generator: Generator,
    *,
    rounds: int,
    rounded: Callable[[Tensor], Tensor],
    error: Callable[[LowRank, Tensor], float],
    factors: Tensor | None = None,
) -> tuple[LowRank, float]:
    """The branch beside which the rest of `weight` is best rounded, and its error.

    In turns: the branch nearest to what the rounded rest lacks, and the rounding of the rest beside that branch.
    """
    best, least, rest = None, float("inf"), torch.zeros_like(weight)
    for _ in range(rounds):
        branch, dense = nearest(weight - rest, rank, generator, factors)
        rest = rounded(weight - dense)
        now = error(branch, rest)
        if best is not None and not now < least:
            break
        best, least = branch, now
    assert best is not None, "no rounds"
    return best, least


def balance(inputs: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """What each input channel is multiplied by: greatest weight^beta / greatest input^alpha, 1 on geometric average.

    `inputs` has the greatest input of each channel; a channel without any, or without weights, stays as it is.
    """
    columns = weight.float().abs().amax(0)
    logs = beta * columns.clamp(min=TINY).log() - alpha * inputs.float().clamp(min=TINY).log()
    used = (columns > TINY) & (inputs > TINY)
    mean = logs[used].mean() if bool(used.any()) else logs.new_zeros(())
    return torch.where(used, logs - mean, 0).exp()


TINY = 1e-12
