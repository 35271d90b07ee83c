"""How many records each step deserves, from how its features lie among those of the other steps.

Steps whose features have many close neighbours stand for many steps; steps whose features point elsewhere add variety.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calib.record import Source, trajectory_seed
from stepquant.errors import MethodError
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run, together

TOGETHER = 8  # trajectories


@dataclass(frozen=True)
class Likeness:
    """Inner products of the features of all pairs of steps, and of their directions over channels: sums over records."""

    gram: Tensor
    directions: Tensor
    elements: int  # of one step
    places: int  # records times pixels

    @classmethod
    def of(cls, features: Tensor, epsilon: float = 1e-6) -> Likeness:
        """Of features (steps, batch, channels, ...)."""
        values = features.double()
        flat = values.flatten(1)
        directions = (values / values.norm(dim=2, keepdim=True).clamp(min=epsilon)).flatten(1)
        elements = features[0].numel()
        return cls(flat @ flat.T, directions @ directions.T, elements, elements // features.shape[2])

    def __add__(self, other: Likeness) -> Likeness:
        """Over the records of both."""
        return Likeness(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def squared_distances(likeness: Likeness) -> Tensor:
    """Mean squared difference between the features of all pairs of steps."""
    gram = likeness.gram
    norms = gram.diagonal()
    both = norms[:, None] + norms[None]
    apart = both - 2 * gram
    return torch.where(apart > 1e-12 * both, apart, 0.0) / likeness.elements  # less is rounding


def neighbours(likeness: Likeness, radius: float | None = None) -> Tensor:
    """For every step, how many others lie within `radius` times the median distance; None: within the lower quartile."""
    distances = squared_distances(likeness)
    others = ~torch.eye(len(distances), dtype=torch.bool)
    if not others.any():
        return torch.zeros(len(distances), dtype=torch.float64)
    apart = distances[others]
    reach = apart.quantile(0.25) if radius is None else radius * apart.quantile(0.5)
    return ((distances <= reach) & others).sum(1).double()


def says_nothing(density: Tensor) -> bool:
    """Whether all steps have as many neighbours."""
    return bool((density == density[0]).all())


def dissimilarity(likeness: Likeness) -> Tensor:
    """For every step, the sum of 1 - cosine over channels to all other steps, records and pixels."""
    apart = likeness.places - likeness.directions
    return apart.sum(1) - apart.diagonal()


def normalised(values: Tensor, scale: float = 1.0) -> Tensor:
    """Stretched to [0, 1]; values that differ by rounding alone, as sums of terms up to `scale` do, become 0."""
    low, high = values.aminmax()
    if high - low <= 1e-9 * scale:
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def counts(
    likeness: Likeness, samples: int, variety: float, radius: float | None = None, floor: float = 0.0
) -> Tensor:
    """Records per step, in proportion to density + `variety` * dissimilarity; they sum to `samples` exactly.

    No step has fewer than `floor` times what all would have if they were shared out evenly.
    """
    steps = len(likeness.gram)
    terms = likeness.places * steps  # cosines in each sum
    score = normalised(neighbours(likeness, radius)) + variety * normalised(dissimilarity(likeness), terms)
    fewest = int(floor * samples / steps)
    return fewest + share_out(score, samples - fewest * steps)


def share_out(score: Tensor, samples: int) -> Tensor:
    """Whole numbers in proportion to `score` that sum to `samples`: largest remainders, the earlier step in a tie."""
    score = torch.where(score.sum() > 0, score, torch.ones_like(score)).double()
    exact = score / score.sum() * samples
    shares = exact.floor().long()
    order = (exact - shares).sort(descending=True, stable=True).indices
    shares[order[: samples - int(shares.sum())]] += 1
    return shares


def likeness_of_steps(source: Source, trajectories: int) -> Likeness:
    """How alike the steps of so many trajectories of the float model are, a few of them in memory at a time."""
    starts = range(0, trajectories, TOGETHER)
    parts = (
        Likeness.of(features_by_step(source, range(start, min(start + TOGETHER, trajectories))))
        for start in source.progress.track(starts, "features by step", len(starts))
    )
    return reduce(add, parts)


def features_by_step(source: Source, trajectories: Sequence[int]) -> Tensor:
    """What the deepest block receives at every step of the float model, (steps, batch, channels, ...)."""
    denoiser = Denoiser.of(source.pipeline)
    block: nn.Module = denoiser.model.get_submodule(denoiser.deepest())
    seen: list[Tensor] = []

    def listen(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values()))).detach().float().cpu())

    handle = block.register_forward_pre_hook(listen, with_kwargs=True)
    seeds = [trajectory_seed(source.seed, trajectory) for trajectory in trajectories]
    batches = together(seeds, source.sampling)
    try:
        with torch.no_grad():
            for some in batches:
                run(source.pipeline, some, source.sampling)
    finally:
        handle.remove()
    if len(seen) != source.steps * len(batches):
        raise MethodError(
            "features cannot be told apart by step",
            got=f"{len(seen)} calls of the denoiser in {source.steps * len(batches)} steps",
            fix="use a sampler and a guidance that call it once per step",
        )
    seen = [torch.cat(seen[step :: source.steps]) for step in range(source.steps)]
    features = torch.stack(seen)
    return features.movedim(-1, 2) if features.ndim == 4 else features  # tokens: channels come last
