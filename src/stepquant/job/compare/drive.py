"""Drive: what every cell still needs follows from what is on disk; tasks are started wherever there is room."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from stepquant.job.compare.cell import Cell, Origin
from stepquant.job.compare.executor import Executor, Finished
from stepquant.job.compare.store import (
    CELL,
    ERROR,
    Places,
    Store,
    artifact_intact,
    is_intact,
    read_found,
    take_lock,
    write_json,
)
from stepquant.job.compare.tasks import Generate, Measure, Quantize, Task, batch_file
from stepquant.models import zoo

MOST_ENDS = 3  # of one task without what it should have made, before its cells are given up
MOST_BATCHES = 16  # in one task, where several workers share the images of a set
SECONDS_BETWEEN_LOOKS = 1.0  # at the cells that another comparison works on


@dataclass(frozen=True)
class Job:
    """A cell and where its parts are."""

    cell: Cell
    places: Places

    @classmethod
    def of(cls, cell: Cell, store: Store, origin: Origin, any_code: bool = False) -> Job:
        return cls(cell, store.places(cell, origin, any_code))

    @property
    def reads(self) -> dict[str, Path]:
        model = self.cell.recipe.model
        return {} if model in zoo.names() else {"model": Path(model)}

    def is_done(self) -> bool:
        return read_found(self.places.cell) is not None

    def quantize(self) -> Quantize:
        return Quantize(
            title=self.cell.title, recipe=self.cell.recipe, reads=self.reads, out=self.places.artifact
        )

    def generate(self, folder: Path, seed: int, first: int, last: int) -> Generate:
        own = folder == self.places.images
        return Generate(
            title=self.cell.title if own else f"float images, seed {seed}",
            recipe=self.cell.recipe,
            evaluation=self.cell.evaluation,
            reads=self.reads | ({"artifact": self.places.artifact} if own else {}),
            seed=seed,
            first=first,
            last=last,
            out=folder,
        )

    def measure(self) -> Measure:
        places = self.places
        sets = {"source": places.source, "other": places.other, "images": places.images}
        cell = self.cell
        return Measure(
            title=cell.title,
            recipe=cell.recipe,
            evaluation=cell.evaluation,
            label=cell.label,
            reads=self.reads | sets | {"artifact": places.artifact} | cell.evaluation.files(),
            out=places.cell,
        )


class Drive:
    """One comparison on its way. What it knows beside the disk: what runs, what was found intact, what died."""

    def __init__(self, jobs: Sequence[Job], executor: Executor) -> None:
        self.executor = executor
        self.left = {job.places.cell: job for job in jobs}
        for job in jobs:
            write_json(job.places.cell / CELL, job.cell.model_dump(mode="json") | {"scheme": job.cell.scheme})
        self.running: dict[str, Task] = {}
        self.locks: dict[Path, FileLock] = {}
        self.intact: set[Path] = set()
        self.ends: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Job]:
        """Jobs as they are finished, well or not; those that were finished before come first."""
        try:
            while self.left:
                yield from self.settle()
                self.fill()
                if self.running:
                    yield from self.take(self.executor.wait())
                elif self.left:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self.executor.close()
            for lock in self.locks.values():
                lock.release()

    def settle(self) -> list[Job]:
        """Cells that are done, by whomever."""
        done = [job for job in self.left.values() if job.is_done()]
        for job in done:
            del self.left[job.places.cell]
            (job.places.cell / ERROR).unlink(missing_ok=True)
            shutil.rmtree(job.places.images, ignore_errors=True)
        return done

    def fill(self) -> None:
        """Start tasks in every free slot, in the order of the cells."""
        for job in self.left.values():
            for task in self.needed(job):
                if len(self.running) >= self.executor.slots:
                    return
                self.begin(task)

    def begin(self, task: Task) -> None:
        """Start a task unless it runs already, here or in another comparison on this store."""
        if task.key in self.running or not self.lock(task.out):
            return
        self.running[task.key] = task
        self.executor.start(task)

    def lock(self, folder: Path) -> bool:
        """Whether the folder is ours, until no task of ours writes there."""
        if folder not in self.locks:
            lock = take_lock(folder)
            if lock is None:
                return False
            self.locks[folder] = lock
        return True

    def take(self, end: Finished) -> list[Job]:
        """What the end of a task means: nothing but another look at the disk, or that its cells have failed."""
        task = self.running.pop(end.task.key)
        if not any(other.out == task.out for other in self.running.values()):
            self.locks.pop(task.out).release()
        self.ends[task.key] += 1
        if not end.error and self.ends[task.key] < MOST_ENDS:
            return []
        if end.died and self.ends[task.key] < MOST_ENDS:
            return []
        words = end.error or "what was made is not there, or not as it was written: look at the disk"
        failed = [job for job in self.left.values() if task.out in job.places.all]
        for job in failed:
            del self.left[job.places.cell]
            known = {"error": words, "kind": end.kind, "during": type(task).__name__.lower()}
            write_json(job.places.cell / ERROR, known)
        return failed

    def needed(self, job: Job) -> Iterator[Task]:
        """What a cell can have made now."""
        places, cell = job.places, job.cell
        quantized = self.once(places.artifact, lambda: artifact_intact(places.artifact))
        if not quantized:
            yield job.quantize()
        sets = [(places.source, cell.recipe.seed), (places.other, cell.other_seed)]
        if quantized and self.executor.slots > 1:
            sets.append((places.images, cell.recipe.seed))
        complete = quantized
        for folder, seed in sets:
            for first, last in self.missing(folder, cell.evaluation.batches):
                complete = False
                yield job.generate(folder, seed, first, last)
        if complete:
            yield job.measure()

    def missing(self, folder: Path, count: int) -> list[tuple[int, int]]:
        """Ranges of batches that are not there yet, in pieces for the workers."""
        most = count if self.executor.slots == 1 else min(MOST_BATCHES, -(-count // self.executor.slots))
        out = []
        for first in range(0, count, most):
            last = min(first + most, count)
            files = [batch_file(folder, number) for number in range(first, last)]
            if not all(self.once(file, partial(is_intact, file)) for file in files):
                out.append((first, last))
        return out

    def once(self, what: Path, is_there: Callable[[], bool]) -> bool:
        """Whether it is intact; looked at until it is."""
        if what not in self.intact and is_there():
            self.intact.add(what)
        return what in self.intact
