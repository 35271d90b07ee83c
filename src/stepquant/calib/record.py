"""Record what the denoiser receives: a hook on its forward, so that x and t cannot come apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepquant.calib.cache import atomically, cache_folder
from stepquant.calib.calibset import ENDS, SHARED, CalibSet
from stepquant.calib.ends import noting
from stepquant.calib.pick import Pick, every
from stepquant.calib.rows import Rows, Steps, check_alike, shard_of
from stepquant.core.digest import tensors_digest, value_digest
from stepquant.errors import CalibrationError
from stepquant.models.call import Call, described
from stepquant.models.denoiser import Denoiser, denoisers
from stepquant.models.generate import asked_of, run, together, words_of
from stepquant.models.hooks import answering_noise, context_names, listening
from stepquant.models.sampling import Enough, Sampling, check_steps, scheduler_of
from stepquant.progress import Progress, Silent

FORMAT = 4
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

    @cached_property
    def steps(self) -> int:
        """States of one trajectory that the denoiser meets: more than were asked for with a sampler of second order, fewer
        from an image, and a part of them where another denoiser meets the rest."""
        if len(denoisers(self.pipeline)) > 1 or any(isinstance(one, Call) for one in self.sampling.prompts):
            return count_steps(self)
        scheduler = scheduler_of(self.pipeline, self.sampling.sampler)
        check_steps(scheduler, self.sampling.steps)
        try:
            scheduler.set_timesteps(self.sampling.steps)
        except ValueError:  # it wants to know more, as the size of images, which the pipeline tells it
            return count_steps(self)
        return len(scheduler.timesteps)

    def times(self) -> Tensor:
        """The t that the network receives at every step, in the sampler's order."""
        data = self.record(every(1, range(self.steps)))
        records = data.take(range(len(data)))
        rows = [int((records.step == step).nonzero()[0]) for step in range(self.steps)]
        times: Tensor = records.arguments[data.t][rows]
        return times

    def key(self, picks: Sequence[Pick]) -> str:
        scheduler, asked = self.pipeline.scheduler, self.sampling
        words = words_of(self.pipeline, asked)
        return value_digest(
            {
                "format": FORMAT,
                "model": self.digest or Denoiser.of(self.pipeline).digest(),
                "around": self.around,
                "scheduler": [type(scheduler).__name__, dict(scheduler.config)],
                "sampling": [
                    asked.steps,
                    asked.sampler,
                    [described(one) for one in words],
                    self.seed,
                    self.batch,
                ],
                "picks": [list(pick) for pick in picks],
            }
        )

    @cached_property
    def around(self) -> dict[str, str]:
        """Digests of what else in the pipeline decides what reaches the denoiser: encoders, adapters, control networks."""
        model = Denoiser.of(self.pipeline).model
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        return {
            name: f"{type(part).__name__} {tensors_digest(part.state_dict())}"
            for name, part in parts.items()
            if part is not model
        }


def record(source: Source, picks: Sequence[Pick]) -> CalibSet:
    if not picks:
        raise CalibrationError(
            "no calibration samples were asked for", fix="give --samples a positive number"
        )
    latest = max(pick.step for pick in picks)
    if latest >= source.steps:
        raise CalibrationError(
            "a picked step lies beyond the sampler", got=latest, expected=f"below {source.steps}"
        )
    folder = source.cache / source.key(picks)[:32]
    folder.mkdir(parents=True, exist_ok=True)
    batches = group(picks, source.batch)
    shards = [folder / f"{number:05d}.safetensors" for number in range(len(batches))]
    denoiser = Denoiser.of(source.pipeline)
    todo = [(shard, batch) for shard, batch in zip(shards, batches) if not is_intact(shard)]
    for shard, batch in source.progress.track(todo, "recording trajectories", len(todo)):
        columns, values = record_batch(source, denoiser, batch)
        atomically(shard, partial(save_file, columns, metadata=values))
    for other in shards[1:]:
        check_alike(first_row(shards[0]), first_row(other), f"batches of trajectories, {other.name}")
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


def first_row(shard: Path) -> dict[str, Tensor]:
    """The first record of a shard, under the names of its columns."""
    with safe_open(shard, "pt") as file:
        names = [name for name in file.keys() if not name.startswith(SHARED) and name != ENDS]  # noqa: SIM118
        return {name: file.get_slice(name)[:1] for name in names}


def record_batch(
    source: Source, denoiser: Denoiser, batch: Mapping[int, list[int]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run one batch of trajectories and keep the wanted rows of every call: tensors and metadata of a shard."""
    seeds = {trajectory_seed(source.seed, trajectory): trajectory for trajectory in batch}
    parts = []
    for some in together(list(seeds), source.sampling):
        wanted = {seeds[seed]: batch[seeds[seed]] for seed in some}
        parts.append((origin_of(source, some), follow(source, denoiser, some, wanted)))
    return shard_of(parts)


def follow(source: Source, denoiser: Denoiser, seeds: Sequence[int], wanted: Mapping[int, list[int]]) -> Rows:
    """Run trajectories that the denoiser meets in one batch, and keep the wanted steps of each."""
    trajectories = list(wanted)
    last = max(max(steps) for steps in wanted.values())
    counted = Steps()

    def listener(_: int, arguments: dict[str, Any]) -> None:
        step, turn = counted.see(arguments[denoiser.family.x], arguments[denoiser.family.t])
        if step > last:
            raise Enough
        rows = [row for row, trajectory in enumerate(trajectories) if step in wanted[trajectory]]
        ends.of_next_call(1, ())
        if rows:
            kept.keep(arguments, rows, step, turn, names[-1] if names else "")

    try:
        with (
            context_names(denoiser.model) as names,
            listening(denoiser, listener),
            noting(denoiser) as ends,
            torch.no_grad(),
        ):
            kept = Rows(denoiser, trajectories, ends)
            run(source.pipeline, seeds, source.sampling, stop=last + 1)
    except Enough:
        return kept
    if counted.step < last:
        raise CalibrationError(
            "a trajectory has fewer steps than others",
            where=origin_of(source, seeds),
            got=counted.step + 1,
            expected=f"more than {last}",
            fix="give all calls the same num_inference_steps and the same strength",
        )
    return kept


def origin_of(source: Source, seeds: Sequence[int]) -> str:
    """Where what was asked stands."""
    first = next(iter(asked_of(source.pipeline, seeds[:1], source.sampling)), "")
    return first.origin if isinstance(first, Call) else f"seed {seeds[0]}"


def count_steps(source: Source) -> int:
    """The states of the first trajectory: the pipeline runs to its end, while what denoises in it computes next to nothing."""
    denoiser, counted = Denoiser.of(source.pipeline), Steps()

    def listener(_: int, arguments: dict[str, Any]) -> None:
        counted.see(arguments[denoiser.family.x], arguments[denoiser.family.t])

    seeds = [trajectory_seed(source.seed, 0)]
    with ExitStack() as stack, listening(denoiser, listener), torch.no_grad():
        for model in denoisers(source.pipeline).values():
            stack.enter_context(answering_noise(model))
        for seed in source.progress.track(seeds, "counting steps", 1):
            run(source.pipeline, [seed], source.sampling)
    if counted.step < 0:
        raise CalibrationError(
            f"the pipeline never called its denoiser '{denoiser.component}'",
            where=origin_of(source, seeds),
            fix="ask for more steps, or for more strength",
        )
    return counted.step + 1


def trajectory_seed(seed: int, trajectory: int) -> int:
    """One seed per trajectory, apart for different base seeds."""
    return (seed * 1_000_003 + trajectory) % 2**63  # what torch takes
