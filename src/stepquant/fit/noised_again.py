"""How much a quantized network errs on average, told by states that are noised again (arXiv:2403.19140)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.progress import Progress
from stepquant.quant.insert import Inserted

SURE = 2.0  # standard errors that an estimate has to be larger than: what is smaller may be chance


def kept_of(scheduler: Any) -> Tensor | None:
    """What a state keeps of the clean one's variance at every t; None where noise does not take its place."""
    kept = getattr(scheduler, "alphas_cumprod", None)
    return None if kept is None else torch.as_tensor(kept).double()


@dataclass(frozen=True)
class NoisedAgain:
    """A quantized network, and records at all steps of some trajectories."""

    network: Inserted
    data: CalibSet
    kept: Tensor
    seed: int
    batch: int

    @cached_property
    def rows(self) -> dict[tuple[int, int, int], int]:
        """(trajectory, branch, step) -> record."""
        names, parts = ("trajectory", "branch", "step"), list(self.data.batches(256))
        columns = (torch.cat([getattr(one, name) for one in parts]).tolist() for name in names)
        return {key: row for row, key in enumerate(zip(*columns))}

    def mean_errors(self, steps: int, interval: int, progress: Progress) -> list[float]:
        """What is to be taken off the prediction at each step.

        It is estimated at every `interval`-th one behind the first; in between the last estimate holds.
        """
        found = [0.0] * steps
        asked = [step for step in range(1, steps - 1) if (step - 1) % interval == interval // 2]
        for step in progress.track(asked, "noised again", len(asked)):
            found[step:] = [self.mean_error(step)] * (steps - step)
        return found

    def mean_error(self, step: int) -> float:
        """Of predictions at this step; 0 where it is not surely another number."""
        pairs = [
            (row, self.rows[trajectory, branch, step + 1])
            for (trajectory, branch, now), row in self.rows.items()
            if now == step and (trajectory, branch, step + 1) in self.rows
        ]
        generator = Generator().manual_seed(self.seed + step)
        starts = range(0, len(pairs), self.batch)
        means = [self.errors(pairs[start : start + self.batch], generator) for start in starts]
        found = torch.cat([torch.zeros(0), *means])
        if len(found) < 2:
            return 0.0
        mean, doubt = found.mean(), found.std() / len(found) ** 0.5
        return float(mean) if abs(mean) > SURE * doubt else 0.0

    @torch.no_grad()
    def errors(self, pairs: Sequence[tuple[int, int]], generator: Generator) -> Tensor:
        """The mean error of every record, given with the record that follows it; none where that cannot be noised."""
        now, later = (self.data.take(rows).arguments for rows in zip(*pairs))
        again = self.noised(now, later, generator)
        if again is None:
            return torch.zeros(0)
        self.network.switch(weights=False, inputs=False)
        exact = self.network.denoiser.predict({**now, self.data.x: again})
        self.network.switch(weights=True, inputs=True)
        found = self.network.denoiser.predict({**now, self.data.x: again})
        return (found - exact).float().flatten(1).mean(1).cpu()

    def noised(self, now: Mapping[str, Any], later: Mapping[str, Any], generator: Generator) -> Tensor | None:
        """From x_{t-1} back to x_t: sqrt(a_t / a_{t-1}) x + sqrt(1 - a_t / a_{t-1}) e."""
        kept, kept_later = (self.kept_at(one[self.data.t]) for one in (now, later))
        x: Any = later[self.data.x]
        if kept is None or kept_later is None or not isinstance(x, Tensor):
            return None
        share = (kept / kept_later).clamp(max=1).reshape(-1, *[1] * (x.dim() - 1))
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (share.sqrt() * x.double().cpu() + (1 - share).sqrt() * noise).to(x)

    def kept_at(self, t: Tensor) -> Tensor | None:
        """None for a t between two known ones."""
        places = t.reshape(-1).double().cpu()
        known = (places == places.round()) & (places >= 0) & (places < len(self.kept))
        return self.kept[places.long()] if bool(known.all()) else None
