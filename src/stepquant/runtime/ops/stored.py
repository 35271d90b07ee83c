"""Products of numbers with a weight as files hold it, which is never written out in floats."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.runtime.ops.operation import Operation


@Operation
def stored_linear(
    x: Tensor,
    weight: Tensor,
    bits: int,
    zero_point: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of numbers times a weight of packed integers from zero up, of 4 or 8 bits, plus bias.

    `scale` and `zero_point` (outputs, groups) are of equal runs of an output's inputs. Sums are float64, rounded once, so
    that the order of additions does not show.
    """
    codes = weight if bits == 8 else torch.stack([weight & 15, weight >> 4], dim=-1)
    centred = codes.reshape(*scale.shape, -1).double() - zero_point.double()[..., None]
    sums = torch.einsum("rgi,ogi->rog", x.double().reshape(len(x), scale.shape[1], -1), centred)
    y = (sums * scale.double()).sum(-1)
    return (y if bias is None else y + bias.double()).float().to(dtype)
