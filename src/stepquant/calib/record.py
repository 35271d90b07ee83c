"""Record what the denoiser receives: a hook on its forward, so that x and t cannot come apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepquant.calib.cache import atomically, cache_folder
from stepquant.calib.calibset import CalibSet, flatten
from stepquant.calib.pick import Pick, every
from stepquant.core.digest import value_digest
from stepquant.errors import CalibrationError
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run, words_of
from stepquant.models.hooks import Enough, listening
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent

FORMAT = 1
MEMORY = 4 << 30


@dataclass(frozen=True)
class Source:
    """Trajectories of a float pipeline that methods record from."""

    pipeline: Any
    sampling: Sampling
    seed: int = 0
    batch: int = 32
    cache: Path = field(default_factory=cache_folder)
    memory: int = (
        MEMORY  # bytes that a method may keep of what flows through the blocks; the rest goes to disk
    )
    progress: Progress = field(default_factory=Silent)
    digest: str | None = None  # of the float model, where it is known already

    def record(self, picks: Sequence[Pick]) -> CalibSet:
        """The picked states of the float model's trajectories, from the cache where they are known."""
        return record(self, picks)

    def times(self) -> Tensor:
        """The t that the network receives at every step, in the sampler's order."""
        data = self.record(every(1, range(self.sampling.steps)))
        records = data.take(range(len(data)))
        first = records.branch == records.branch.min()
        times: Tensor = records.arguments[data.t][first]
        return times[records.step[first].argsort()]

    def key(self, picks: Sequence[Pick]) -> str:
        scheduler, asked = self.pipeline.scheduler, self.sampling
        return value_digest(
            {
                "format": FORMAT,
                "model": self.digest or Denoiser.of(self.pipeline).digest(),
                "scheduler": [type(scheduler).__name__, dict(scheduler.config)],
                "sampling": [
                    asked.steps,
                    asked.sampler,
                    words_of(self.pipeline, asked),
                    self.seed,
                    self.batch,
                ],
                "picks": [list(pick) for pick in picks],
            }
        )


def record(source: Source, picks: Sequence[Pick]) -> CalibSet:
    if not picks:
        raise CalibrationError(
            "no calibration samples were asked for", fix="give --samples a positive number"
        )
    latest = max(pick.step for pick in picks)
    if latest >= source.sampling.steps:
        raise CalibrationError(
            "a picked step lies beyond the sampler", got=latest, expected=f"below {source.sampling.steps}"
        )
    folder = source.cache / source.key(picks)[:32]
    folder.mkdir(parents=True, exist_ok=True)
    batches = group(picks, source.batch)
    shards = [folder / f"{number:05d}.safetensors" for number in range(len(batches))]
    denoiser = Denoiser.of(source.pipeline)
    todo = [(shard, batch) for shard, batch in zip(shards, batches) if not is_intact(shard)]
    for shard, batch in source.progress.track(todo, "recording trajectories", len(todo)):
        columns = record_batch(source, denoiser, batch)
        atomically(shard, partial(save_file, columns))
    rows = [(number, row) for number, shard in enumerate(shards) for row in range(count_rows(shard))]
    origin = {
        "steps": source.sampling.steps,
        "sampler": source.sampling.sampler,
        "seed": source.seed,
        "model": type(denoiser.model).__name__,
    }
    atomically(folder / "origin.json", lambda temporary: temporary.write_text(json.dumps(origin)))
    return CalibSet(tuple(shards), shuffled(rows, source.seed), denoiser.family.x, denoiser.family.t, origin)


def is_intact(shard: Path) -> bool:
    """Whether a shard is there and whole; a damaged one is recorded again."""
    try:
        return shard.exists() and count_rows(shard) > 0
    except SafetensorError:
        return False


def count_rows(shard: Path) -> int:
    with safe_open(shard, "pt") as file:
        return int(file.get_slice("step").get_shape()[0])


def group(picks: Sequence[Pick], size: int) -> list[dict[int, list[int]]]:
    """Batches of trajectory -> steps; trajectories that end early share a batch, so that it can stop early."""
    wanted: dict[int, list[int]] = {}
    for pick in picks:
        wanted.setdefault(pick.trajectory, []).append(pick.step)
    order = sorted(wanted, key=lambda trajectory: (max(wanted[trajectory]), trajectory))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [{trajectory: sorted(wanted[trajectory]) for trajectory in chunk} for chunk in chunks]


def shuffled(rows: list[tuple[int, int]], seed: int) -> tuple[tuple[int, int], ...]:
    """Records in random order: neighbours in a shard come from the same steps."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return tuple(rows[int(i)] for i in order)


def record_batch(source: Source, denoiser: Denoiser, batch: Mapping[int, list[int]]) -> dict[str, Tensor]:
    """Run one batch of trajectories and keep the wanted rows of every call."""
    trajectories, kept = list(batch), []
    last = max(max(steps) for steps in batch.values())

    def listener(call: int, arguments: dict[str, Any]) -> None:
        rows = [row for row, trajectory in enumerate(trajectories) if call in batch[trajectory]]
        if rows:
            kept.append(keep(denoiser, arguments, rows, trajectories, call))
        if call == last + 1:
            raise Enough

    seeds = [trajectory_seed(source.seed, trajectory) for trajectory in trajectories]
    try:
        with listening(denoiser, listener), torch.no_grad():
            run(source.pipeline, seeds, source.sampling, stop=last + 1)
    except Enough:
        pass
    return {name: torch.cat([columns[name] for columns in kept]).contiguous() for name in kept[0]}


def keep(
    denoiser: Denoiser, arguments: Mapping[str, Any], rows: list[int], trajectories: list[int], step: int
) -> dict[str, Tensor]:
    """The rows of one call, every guidance branch of each, as they reached the network."""
    flat = flatten({k: v for k, v in arguments.items() if k not in denoiser.family.shared})
    entries = flat[denoiser.family.x].shape[0]
    branches = max(entries // len(trajectories), 1)
    places = torch.tensor([branch * len(trajectories) + row for branch in range(branches) for row in rows])
    columns = {name: take_rows(value, places, entries).detach().cpu().clone() for name, value in flat.items()}
    conditional = 0 if denoiser.family.guidance == "cond, uncond" else 1
    branch = (
        (places // len(trajectories) == conditional).long()
        if branches > 1
        else torch.zeros(len(places), dtype=torch.long)
    )
    return columns | {
        "step": torch.full((len(places),), step),
        "trajectory": torch.tensor([trajectories[int(place) % len(trajectories)] for place in places]),
        "branch": branch,
    }


def take_rows(value: Tensor, places: Tensor, entries: int) -> Tensor:
    """Rows of an argument; one value for the whole batch (a scalar time) is the same for every row."""
    if value.ndim == 0:
        return value.expand(len(places))
    if value.shape[0] == entries:
        return value[places]
    return value.expand(len(places), *value.shape[1:])


def trajectory_seed(seed: int, trajectory: int) -> int:
    """One seed per trajectory, apart for different base seeds."""
    return (seed * 1_000_003 + trajectory) % 2**63  # what torch takes
