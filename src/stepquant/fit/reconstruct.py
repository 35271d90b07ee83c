"""Reconstruction: learn roundings and scales of one block so that, quantized, it returns what it returns in float.

One loop for blocks and for single layers, for every loss, sample weight and choice of what is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from stepquant.core.rounding import anneal, indecision
from stepquant.errors import MethodError
from stepquant.fit.checkpoint import Batches, Checkpoint
from stepquant.fit.learner import Learner, Sample, Schedule
from stepquant.fit.streams import Piece, Table
from stepquant.progress import Progress, Silent
from stepquant.quant.insert import Inserted


@dataclass(frozen=True)
class Report:
    """Losses on held-out records, weights rounded for good in all but `soft`."""

    path: str
    nearest: float  # before: rounding to nearest, scales as they were set
    hard: float
    soft: float
    iterations: int
    weights: Sequence[float] = ()  # the least and the greatest of a training record, where they are learnt

    @property
    def gap(self) -> float:
        """How much the loss rises when soft roundings become hard."""
        return self.hard - self.soft


def reconstruct(
    network: Inserted,
    piece: Piece,
    sample: Sample,
    schedule: Schedule,
    seed: int,
    progress: Progress | None = None,
    file: Path | None = None,
) -> Report:
    """Learn the roundings and scales of `piece` and settle them; they stay as they are where that does not help.

    What was learnt so far is kept in `file`, at every look at the held-out records.
    """
    generator = Generator().manual_seed(seed)
    learner = Learner(network, piece, schedule, generator)
    with torch.no_grad():
        nearest = learner.held_loss(sample)
    groups = learner.parameters()
    if not groups or not schedule.iterations:
        return Report(piece.path, nearest, nearest, nearest, 0)
    learner.attach()
    try:
        done, best, state = optimise(learner, sample, groups, progress or Silent(), file)
        learner.restore(state)
        with learner.evaluating(hard=False):
            soft = learner.held_loss(sample)
    except BaseException:
        learner.detach()
        raise
    if best >= nearest:
        learner.detach()
        return Report(piece.path, nearest, nearest, soft, done)
    learner.settle()
    return Report(piece.path, nearest, best, soft, done)


def optimise(
    learner: Learner,
    sample: Sample,
    groups: list[dict[str, object]],
    progress: Progress,
    file: Path | None = None,
) -> tuple[int, float, list[Tensor]]:
    """Adam with cosine rates; the state with the least hard-rounded loss on held-out records wins.

    Roundings are learnt until they are decided: until soft and hard loss agree and the hard one falls no more.
    """
    schedule = learner.schedule
    optimizer = torch.optim.Adam(groups, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    every = max(schedule.iterations // schedule.checks, 1)
    annealed = bool(
        schedule.penalty and learner.roundings
    )  # hard losses fall last, so it has to run to its end
    batches = Batches(sample.train, schedule, learner.generator)
    now = Checkpoint(learner, optimizer, batches, file)
    now.go_on()
    chosen = reading_ahead(sample.mapped, batches)
    left = range(now.iteration + 1, schedule.iterations + 1)
    for iteration, rows in zip(progress.track(left, "learning", len(left)), chosen):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * cosine((iteration - 1) / schedule.iterations, schedule.last)
        optimizer.zero_grad(set_to_none=True)
        loss = learner.loss(sample, rows) + regulariser(learner, iteration / schedule.iterations)
        check_finite(loss, learner.piece.path, iteration)
        loss.backward()
        optimizer.step()
        now.iteration = iteration
        if iteration % every and iteration != schedule.iterations:
            continue
        with learner.evaluating(hard=True):
            held = learner.held_loss(sample)
        falls = held < 0.99 * now.best
        now.look(held)
        if now.waited >= schedule.patience and not annealed:
            break
        if annealed and not falls and is_decided(learner, sample, held):
            break
        now.keep()
    return now.iteration, now.best, now.best_state


def is_decided(learner: Learner, sample: Sample, hard: float) -> bool:
    """Whether rounding for good changes the loss on held-out records by a small share of it at most."""
    if not learner.schedule.gap:
        return False
    with learner.evaluating(hard=False):
        soft = learner.held_loss(sample)
    return abs(hard - soft) <= learner.schedule.gap * hard


def cosine(progress: float, last: float) -> float:
    """From 1 to `last` along half a cosine."""
    return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


def reading_ahead(tables: Sequence[Table], batches: Batches) -> Iterator[Tensor]:
    """The batches, while a thread reads the next one's rows of tables that are on disk."""
    if not tables:
        yield from (rows for rows, _ in batches)
        return
    with ThreadPoolExecutor(1) as pool:
        reading: Future[None] | None = None
        for rows, coming in batches:
            if len(coming) and (reading is None or reading.done()):
                reading = pool.submit(touch, tables, coming)
            yield rows


def touch(tables: Sequence[Table], rows: Tensor) -> None:
    for table in tables:
        table.touch(rows)


def regulariser(learner: Learner, progress: float) -> Tensor | float:
    """Pushes roundings to integers once the warm-up is over."""
    schedule = learner.schedule
    if not schedule.penalty or progress < schedule.warmup:
        return 0.0
    beta = anneal((progress - schedule.warmup) / max(1 - schedule.warmup, 1e-9), *schedule.beta)
    shares = [indecision(rounding.share, beta) for rounding in learner.roundings.values()]
    return schedule.penalty * torch.stack(shares).sum() if shares else 0.0


def check_finite(loss: Tensor, path: str, iteration: int) -> None:
    if not torch.isfinite(loss):
        raise MethodError(
            f"the loss of '{path or 'the network'}' is not finite",
            got=f"{loss.item()} in iteration {iteration}",
            fix="lower the learning rates, or keep this block in float with a plan rule",
        )
