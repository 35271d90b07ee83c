"""Rows of what reaches the denoiser along one batch of trajectories: which step a call belongs to, and which branch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepquant.calib.calibset import SHARED, VALUES, leaves
from stepquant.errors import CalibrationError
from stepquant.models.denoiser import Denoiser

BRANCHES = {"cond": 1, "uncond": 0}  # names of cache contexts that say which branch a call is


class Steps:
    """Numbers the states of a batch of trajectories: calls that read the same x and t are branches of one step.

    t alone would not do, because schedulers of second order repeat it.
    """

    def __init__(self) -> None:
        self.step, self.turn = -1, 0
        self.state: tuple[Tensor, Tensor] | None = None

    def see(self, x: Tensor, t: Any) -> tuple[int, int]:
        """The step of a call, and how many calls of this step came before."""
        # One row is enough, and a branch may have fewer of them than another.
        state = (x[:1].detach().clone(), torch.as_tensor(t).reshape(-1)[:1].clone())
        same = self.state is not None and all(map(torch.equal, state, self.state))
        self.step, self.turn = (self.step, self.turn + 1) if same else (self.step + 1, 0)
        self.state = state
        return self.step, self.turn


@dataclass
class Rows:
    """Columns of the wanted rows, call by call, and what all calls have in common."""

    denoiser: Denoiser
    trajectories: Sequence[int]
    columns: list[dict[str, Tensor]] = field(default_factory=list)
    turns: list[tuple[int, str]] = field(default_factory=list)  # of each call in its step, and its context
    shared: dict[str, Any] = field(default_factory=dict)

    def keep(
        self, arguments: Mapping[str, Any], rows: Sequence[int], step: int, turn: int, context: str
    ) -> None:
        """The rows of one call, every guidance branch of each, as they reached the network."""
        t = self.denoiser.family.t
        given = dict(leaves({**arguments, t: torch.as_tensor(arguments[t])}))
        alone = {name for name, value in given.items() if not self.has_rows(name, value)}
        self.share({name: given[name] for name in sorted(alone)}, step)
        flat = {name: value for name, value in given.items() if name not in alone}
        count = len(self.trajectories)
        entries = len(flat[self.denoiser.family.x])
        branches = max(entries // count, 1)
        places = torch.tensor([branch * count + row for branch in range(branches) for row in rows])
        columns = {
            name: take_rows(name, value, places, entries).detach().cpu().clone()
            for name, value in flat.items()
        }
        conditional = 0 if self.denoiser.family.guidance == "cond, uncond" else 1
        branch = (places // count == conditional).long() if branches > 1 else torch.zeros(len(places)).long()
        columns |= {
            "step": torch.full((len(places),), step),
            "trajectory": torch.tensor([self.trajectories[int(place) % count] for place in places]),
            "branch": branch,
        }
        if self.columns:
            check_alike(self.columns[0], columns, f"step {step}")
        self.columns.append(columns)
        self.turns.append((-1 if branches > 1 else turn, context))

    def has_rows(self, name: str, value: Any) -> bool:
        return isinstance(value, Tensor) and name.partition(".")[0] not in self.denoiser.family.shared

    def share(self, values: Mapping[str, Any], step: int) -> None:
        """What has no rows must be the same in all calls."""
        kept = {
            name: value.detach().cpu() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        kept = {name: value for name, value in kept.items() if value is not None}
        for name, value in kept.items():
            if not isinstance(value, Tensor | bool | int | float | str):
                raise CalibrationError(
                    f"the argument '{name}' of the denoiser cannot be recorded", got=type(value).__name__
                )
        if self.columns and not same(kept, self.shared):
            changed = next(n for n in kept | self.shared if not same_value(kept.get(n), self.shared.get(n)))
            raise CalibrationError(
                f"the argument '{changed}' of the denoiser changes between calls",
                where=f"step {step}",
                got=kept.get(changed),
                expected=f"always {self.shared.get(changed)}",
                fix="leave out what changes the pipeline on the way",
            )
        self.shared = kept

    def together(self) -> dict[str, Tensor]:
        """All rows; where branches came in calls of their own, those are told apart now."""
        guided = any(turn > 0 for turn, _ in self.turns)
        for (turn, context), columns in zip(self.turns, self.columns):
            if turn >= 0:
                # Pipelines that call twice ask for the conditional branch first.
                label = BRANCHES.get(context, int(guided and turn == 0))
                columns["branch"] = torch.full_like(columns["branch"], label)
        return {name: torch.cat([one[name] for one in self.columns]) for name in self.columns[0]}


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(same_value(ours[name], theirs[name]) for name in ours)


def same_value(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def take_rows(name: str, value: Tensor, places: Tensor, entries: int) -> Tensor:
    """Rows of an argument; one value for the whole batch (a scalar time) is the same for every row."""
    if value.ndim == 0:
        return value.expand(len(places))
    if value.shape[0] == entries:
        return value[places.to(value.device)]
    if value.shape[0] == 1:
        return value.expand(len(places), *value.shape[1:])
    raise CalibrationError(
        f"the argument '{name}' of the denoiser has other rows than its noisy input",
        got=tuple(value.shape),
        expected=f"{entries} rows, or one",
        fix="declare it as shared in its family, if it has no batch axis",
    )


def check_alike(first: Mapping[str, Tensor], other: Mapping[str, Tensor], where: str) -> None:
    """Records can be put into one batch: they have the same arguments of the same shapes."""
    shapes, others = ({name: tuple(v.shape[1:]) for name, v in one.items()} for one in (first, other))
    for name in shapes | others:
        if shapes.get(name) != others.get(name):
            raise CalibrationError(
                f"what the denoiser receives as '{name}' differs between calls",
                where=where,
                got=others.get(name, "nothing"),
                expected=str(shapes.get(name, "nothing")),
                fix="give all calls the same height, width, number of frames and length of text, and the same arguments",
            )


def shard_of(parts: Sequence[tuple[str, Rows]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file that holds the rows of some batches of trajectories, each with its name."""
    tables = [rows.together() for _, rows in parts]
    first = parts[0][1]
    for (name, rows), columns in zip(parts, tables):
        check_alike(tables[0], columns, name)
        first.share(rows.shared, 0)
    columns = {name: torch.cat([one[name] for one in tables]).contiguous() for name in tables[0]}
    tensors = {n: value.contiguous() for n, value in first.shared.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in first.shared.items() if name not in tensors}
    return columns | {f"{SHARED}{name}": value for name, value in tensors.items()}, noted(values)


def noted(values: Mapping[str, Any]) -> dict[str, str]:
    """Values that are no tensors, as metadata."""
    return {VALUES: json.dumps(values)} if values else {}
