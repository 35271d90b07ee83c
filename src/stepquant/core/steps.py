"""Tables with a row for every step of a sampler, found by the exact bits of t; t itself is no index.

Schedulers repeat t, make it fractional or a logarithm of sigma, so that nothing is computed from it and nothing
between two known values is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepTable:
    """The values of t that a sampler feeds to the network, in its order, and the row that each of them reads."""

    times: Tensor  # (steps,) float64, all different
    rows: Tensor  # (steps,) int64

    @classmethod
    def of(cls, times: Tensor, groups: int | None = None) -> StepTable:
        """One row for each t, or `groups` rows that neighbours share; a repeated t keeps its first place."""
        values = list(dict.fromkeys(times.double().tolist()))
        count = min(groups or len(values), len(values))
        rows = torch.arange(len(values)) * count // len(values)
        return cls(torch.tensor(values, dtype=torch.float64), rows)

    @property
    def groups(self) -> int:
        return int(self.rows.max()) + 1

    def places(self, t: Tensor) -> Tensor:
        """The place of every value of `t` among the known times; -1 where it is unknown."""
        same = t.detach().double().reshape(-1, 1).cpu() == self.times
        return torch.where(same.any(1), same.long().argmax(1), -1)

    def rows_of(self, t: Tensor) -> Tensor:
        """The row of every value of `t`; -1 where it is unknown."""
        places = self.places(t)
        return torch.where(places < 0, -1, self.rows[places])

    def to_bits(self) -> Tensor:
        """The times as integers that no change of dtype can touch."""
        return self.times.view(torch.int64).clone()

    @classmethod
    def from_bits(cls, bits: Tensor, rows: Tensor) -> StepTable:
        return cls(bits.cpu().contiguous().view(torch.float64), rows.cpu().long())


@dataclass(frozen=True)
class StepCorrection:
    """Undoes the part of the quantization error that is known at each step: out = scale * predicted + bias.

    What remains has the variance `variance`. All three are (steps, channels), a row for each time of the table
    that they go with. `noise` says what becomes of the variance: nothing, or the sampler's own noise is made
    smaller by it (absorb), or noise of that variance is taken off (sample).
    """

    scale: Tensor
    bias: Tensor
    variance: Tensor
    noise: str = "none"

    def behind(self, scale: Tensor, bias: Tensor) -> StepCorrection:
        """Both in one: this correction of predictions that were corrected by those."""
        return replace(self, scale=self.scale * scale, bias=self.scale * bias + self.bias)

    def __call__(self, predicted: Tensor, places: Tensor, channels: int = 1) -> Tensor:
        """The corrected prediction of samples at these places of the table; its channels are on that axis."""
        shape = (len(places), -1) + (1,) * (predicted.ndim - 2)
        scale, bias = (
            rows[places].reshape(shape).movedim(1, channels).to(predicted.device)
            for rows in (self.scale, self.bias)
        )
        return (predicted.float() * scale + bias).to(predicted.dtype)
