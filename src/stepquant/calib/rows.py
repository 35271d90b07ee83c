"""Rows of what reaches the denoiser along one batch of trajectories: which step a call belongs to, and which branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepquant.calib.calibset import ENDS, SHARED, written_form
from stepquant.calib.ends import Ends
from stepquant.calib.form import Parts
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

    def see(self, x: Tensor | Sequence[Tensor], t: Any) -> tuple[int, int]:
        """The step of a call, and how many calls of this step came before."""
        # One row is enough, and a branch may have fewer of them than another.
        state = (torch.as_tensor(x[0]).detach().clone(), torch.as_tensor(t).reshape(-1)[:1].clone())
        same = self.state is not None and all(map(torch.equal, state, self.state))
        self.step, self.turn = (self.step, self.turn + 1) if same else (self.step + 1, 0)
        self.state = state
        return self.step, self.turn


@dataclass
class Rows:
    """Columns of the wanted rows, call by call, and what all calls have in common."""

    denoiser: Denoiser
    trajectories: Sequence[int]
    ends: Ends | None = None  # what sees the calls whose rows are kept
    columns: list[dict[str, Tensor]] = field(default_factory=list)
    turns: list[tuple[int, str]] = field(default_factory=list)  # of each call in its step, and its context
    form: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def keep(
        self, arguments: Mapping[str, Any], rows: Sequence[int], step: int, turn: int, context: str
    ) -> None:
        """The rows of one call, every guidance branch of each, as they reached the network."""
        family = self.denoiser.family
        given = {**arguments, family.t: torch.as_tensor(arguments[family.t])}
        parts = Parts.of(given, family)
        self.share(parts.form, parts.shared, step)
        count = len(self.trajectories)
        branches = max(parts.entries // count, 1)
        places = torch.tensor([branch * count + row for branch in range(branches) for row in rows])
        columns = {
            name: value[places.to(value.device)].detach().cpu().clone() for name, value in parts.rows.items()
        }
        conditional = 0 if family.guidance == "cond, uncond" else 1
        branch = (places // count == conditional).long() if branches > 1 else torch.zeros(len(places)).long()
        columns |= {
            "step": torch.full((len(places),), step),
            "trajectory": torch.tensor([self.trajectories[int(place) % count] for place in places]),
            "branch": branch,
        }
        if self.ends is not None:
            columns[ENDS] = self.ends.of_next_call(parts.entries, places)
        if self.columns:
            check_alike(self.columns[0], columns, f"step {step}")
        self.columns.append(columns)
        self.turns.append((-1 if branches > 1 else turn, context))

    def share(self, form: Mapping[str, Any], shared: Mapping[str, Tensor], step: int) -> None:
        """What has no rows must be the same in all calls."""
        if not self.form:
            self.form, self.shared = dict(form), dict(shared)
        names = {
            name.partition(".")[0]
            for name in {**shared, **self.shared}
            if not same(name, shared, self.shared)
        }
        names |= {name for name in {**form, **self.form} if form.get(name) != self.form.get(name)}
        if names:
            raise CalibrationError(
                f"the argument '{min(names)}' of the denoiser changes between calls",
                where=f"step {step}",
                got=described(form.get(min(names))),
                expected=f"always {described(self.form.get(min(names)))}",
                fix="leave out what changes the pipeline on the way, and give all calls the same sizes",
            )

    def together(self) -> dict[str, Tensor]:
        """All rows; where branches came in calls of their own, those are told apart now."""
        guided = any(turn > 0 for turn, _ in self.turns)
        for (turn, context), columns in zip(self.turns, self.columns):
            if turn >= 0:
                # Pipelines that call twice ask for the conditional branch first.
                label = BRANCHES.get(context, int(guided and turn == 0))
                columns["branch"] = torch.full_like(columns["branch"], label)
        return {name: torch.cat([one[name] for one in self.columns]) for name in self.columns[0]}


def same(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    one, other = ours.get(name), theirs.get(name)
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def described(form: Any) -> str:
    """What an argument was, for people."""
    return "a tensor" if isinstance(form, dict) else str(form)


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
        first.share(rows.form, rows.shared, 0)
    columns = {name: torch.cat([one[name] for one in tables]).contiguous() for name in tables[0]}
    shared = {f"{SHARED}{name}": value.contiguous() for name, value in first.shared.items()}
    places = () if first.ends is None else tuple(first.ends.places)
    return columns | shared, written_form(first.form, places)
