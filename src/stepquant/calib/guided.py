"""States of the sampler: the records whose predictions become the one that it reads, and how much each counts in that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.calib.record import Source, trajectory_seed
from stepquant.models.generate import asked_of
from stepquant.models.pipelines.calling import guidance_of

BRANCHES = [0, 1]


@dataclass(frozen=True)
class State:
    """Records of one trajectory at one step."""

    records: tuple[int, ...]
    factors: tuple[float, ...]


def alone(records: int) -> list[State]:
    """Every record is a state."""
    return [State((record,), (1.0,)) for record in range(records)]


def states_of(data: CalibSet, source: Source) -> list[State]:
    """Guidance reads u + s (c - u) of the branches without and with the condition: 1 - s and s of them.

    Where there are others, or nobody knows s, every record is a state.
    """
    found: dict[tuple[int, int], dict[int, int]] = {}
    for record, (trajectory, step, branch) in enumerate(data.places()):
        branches = found.setdefault((trajectory, step), {})
        if branch in branches:
            return alone(len(data))
        branches[branch] = record
    states = []
    for (trajectory, _), branches in found.items():
        scale = guidance_at(source, trajectory)
        if sorted(branches) != BRANCHES or scale is None:
            return alone(len(data))
        states.append(State((branches[0], branches[1]), (1 - scale, scale)))
    return states


def guidance_at(source: Source, trajectory: int) -> float | None:
    """The s with which the pipeline was called for a trajectory."""
    asked = asked_of(source.pipeline, [trajectory_seed(source.seed, trajectory)], source.sampling)
    return guidance_of(source.pipeline, asked[0] if asked else None)


def read_by_sampler(predictions: Tensor, states: Sequence[State]) -> Tensor:
    """What the sampler reads at every state, of the predictions for all their records in turn."""
    owners = [place for place, state in enumerate(states) for _ in state.records]
    factors = torch.tensor(
        [factor for state in states for factor in state.factors], device=predictions.device
    )
    rows = predictions.unflatten(0, (len(owners), -1))  # one or some for each record
    read = rows.new_zeros(len(states), *rows.shape[1:])
    shares = rows * factors.view(-1, *[1] * (rows.ndim - 1))
    return read.index_add(0, torch.tensor(owners, device=rows.device), shares)
