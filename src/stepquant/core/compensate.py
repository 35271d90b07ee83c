"""Rounding one column after another, each error made good by the columns that are still free (arXiv:2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.core.affine import quantize
from stepquant.core.codebook import nearest
from stepquant.core.grid import Grid


def round_compensated(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    block: int = 128,
    by_importance: bool = False,
    codebook: Tensor | None = None,
) -> Tensor:
    """Integers for `weight` (rows, columns) whose output error tr(dW H dW^T) is small, H being `hessian` (columns, columns).

    `scale` and `zero_point` have the shape of `weight`; `codebook` has the integers that each row may take. `by_importance` takes the columns with the largest H_jj first.
    """
    order = torch.arange(weight.shape[1], device=weight.device)
    if by_importance:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    weight, scale, zero_point = (
        value.to(factor.dtype)[:, order]
        for value in (weight, scale.expand_as(weight), zero_point.expand_as(weight))
    )
    integers = torch.empty_like(weight)
    for start in range(0, weight.shape[1], block):
        columns = slice(start, min(start + block, weight.shape[1]))
        inner, errors = factor[columns, columns], torch.zeros_like(weight[:, columns])
        part = weight[:, columns].clone()
        for j in range(part.shape[1]):
            at = start + j
            if codebook is None:
                q = quantize(part[:, j], scale[:, at], zero_point[:, at], grid).to(weight.dtype)
            else:
                q = nearest((part[:, j] / scale[:, at])[:, None], codebook.to(weight.dtype))[:, 0]
            integers[:, at] = q
            # Eq. 2: what this column loses is spread over the columns after it.
            errors[:, j] = (part[:, j] - (q - zero_point[:, at]) * scale[:, at]) / inner[j, j]
            part[:, j + 1 :] -= errors[:, j, None] * inner[j, j + 1 :]
        weight[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return integers[:, order.argsort()].float()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse: its rows hold what Eq. 3 needs when columns are left out in turn.

    Inputs that are always zero get a diagonal of their own; they neither give errors nor take them.
    """
    hessian = hessian.double()
    mean = hessian.diagonal().mean()
    dead = hessian.diagonal() <= 0
    raised = hessian + torch.diag(damping * mean + dead * torch.where(mean > 0, mean, torch.ones_like(mean)))
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        raised.diagonal().mul_(1.1)  # fewer records than inputs, and little damping
    raise ValueError("the Hessian of the inputs is not positive: raise damping, or use more records")
