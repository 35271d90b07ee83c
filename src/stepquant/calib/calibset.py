"""CalibSet: frozen records of what the denoiser really received."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stepquant.calib.form import put_together
from stepquant.core.policy import FloatSteps
from stepquant.errors import CalibrationError

META = ("step", "trajectory", "branch")
# What all records of a shard share: tensors without rows, and in its metadata the form of the arguments and the places
# that its ends are of. One entry: of several the file has no order, and the same records would not be the same bytes.
SHARED, FORM = "shared ", "form"
ENDS = "ends"  # a column of no argument


@dataclass(frozen=True)
class Batch:
    """Some records at once: the denoiser's arguments by name, and where each row comes from."""

    arguments: Mapping[str, Any]
    step: Tensor  # index in the sampler's loop, 0 = noisiest
    trajectory: Tensor
    branch: Tensor  # guidance branch: 0 = the only one or the unconditional one, 1 = conditional
    weight: Tensor

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class CalibSet:
    """Records on disk, read in batches; memory holds one batch."""

    shards: tuple[Path, ...]
    index: tuple[tuple[int, int], ...]  # record -> (shard, row)
    x: str  # argument with the noisy input
    t: str  # argument with the time
    origin: Mapping[str, Any]
    weights: tuple[float, ...] | None = None  # one per record, mean 1

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int) -> Iterator[Batch]:
        """All records in order, the remainder included."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def take(self, records: Sequence[int]) -> Batch:
        """The records with these numbers, in this order."""
        wanted: dict[int, list[int]] = {}
        for place, record in enumerate(records):
            wanted.setdefault(self.index[record][0], []).append(place)
        rows: list[dict[str, Tensor]] = [{} for _ in records]
        shared: dict[str, Tensor] = {}
        form: dict[str, Any] = {}
        for shard, places in wanted.items():
            with safe_open(self.shards[shard], "pt") as file:
                columns = {name: file.get_tensor(name) for name in file.keys() if name != ENDS}  # noqa: SIM118
                form |= form_of(file)["arguments"]
            for name in [name for name in columns if name.startswith(SHARED)]:
                shared[name.removeprefix(SHARED)] = columns.pop(name)
            for place in places:
                row = self.index[records[place]][1]
                rows[place] = {name: column[row] for name, column in columns.items()}
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        check_finite(stacked[self.x], stacked["step"])
        weight = torch.ones(len(records))
        if self.weights is not None:
            weight = torch.tensor([self.weights[record] for record in records])
        meta = {name: stacked.pop(name) for name in META}
        arguments = {name: put_together(one, stacked | shared) for name, one in form.items()}
        return Batch(arguments, weight=weight, **meta)

    def subset(self, records: Sequence[int]) -> CalibSet:
        """Only these records."""
        weights = None if self.weights is None else tuple(self.weights[r] for r in records)
        return CalibSet(
            self.shards, tuple(self.index[r] for r in records), self.x, self.t, self.origin, weights
        )

    def ends(self, records: Sequence[int]) -> dict[str, Tensor]:
        """The least and the greatest number of what was read in each of these records, by place; nothing where a shard
        does not say them."""
        shards = sorted({self.index[record][0] for record in records})
        found: dict[int, dict[str, Tensor]] = {}
        for shard in shards:
            with safe_open(self.shards[shard], "pt") as file:
                places = form_of(file)["places"]
                found[shard] = dict(zip(places, file.get_tensor(ENDS).unbind(1))) if places else {}
        places = [place for place in found[shards[0]] if all(place in one for one in found.values())]
        rows = [self.index[record] for record in records]
        return {place: torch.stack([found[shard][place][row] for shard, row in rows]) for place in places}

    def steps(self) -> Tensor:
        """The step of every record."""
        return torch.cat([batch.step for batch in self.batches(256)])

    def rounded(self, spared: FloatSteps) -> list[int]:
        """The records at steps whose activations are rounded: not in float."""
        floats = [spared(batch.arguments[self.t], len(batch)) for batch in self.batches(256)]
        return (~torch.cat(floats)).nonzero().flatten().tolist()

    def places(self) -> list[tuple[int, int, int]]:
        """Trajectory, step and branch of every record."""
        columns = ((batch.trajectory, batch.step, batch.branch) for batch in self.batches(256))
        return [place for some in columns for place in zip(*(column.tolist() for column in some))]

    def trajectories(self) -> Tensor:
        """The trajectory of every record."""
        return torch.cat([batch.trajectory for batch in self.batches(256)])


def written_form(arguments: Mapping[str, Any], places: Sequence[str] = ()) -> dict[str, str]:
    """The metadata of a shard."""
    return {FORM: json.dumps({"arguments": arguments, "places": list(places)})}


def form_of(file: Any) -> dict[str, Any]:
    """What `written_form` has written."""
    form: dict[str, Any] = json.loads(file.metadata()[FORM])
    return form


def check_finite(x: Tensor, steps: Tensor) -> None:
    bad = ~torch.isfinite(x.flatten(1)).all(1)
    if bad.any():
        raise CalibrationError(
            "calibration data is not finite",
            got=f"NaN or infinite values at step {int(steps[bad][0])}",
            fix="sample the float model first: its own trajectory diverges",
        )
