"""Executors: where tasks run. A comparison starts tasks while there are free slots, and waits for what comes back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from stepquant.errors import StepquantError
from stepquant.job.compare.tasks import Task
from stepquant.progress import Progress, Silent


@dataclass(frozen=True)
class Finished:
    """A task that came back: well, with an error of its own, or because its worker died."""

    task: Task
    error: str = ""
    kind: str = ""
    died: bool = False


class Executor(Protocol):
    """Runs up to `slots` tasks at once."""

    slots: int

    def start(self, task: Task) -> None: ...

    def wait(self) -> Finished:
        """The next task that is done; there must be one that was started."""

    def close(self) -> None:
        """Stop what still runs."""


class Inline:
    """Everything in this process, one after the other."""

    slots = 1

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress or Silent()
        self.waiting: deque[Task] = deque()

    def start(self, task: Task) -> None:
        self.waiting.append(task)

    def wait(self) -> Finished:
        task = self.waiting.popleft()
        try:
            task.perform(self.progress)
        except Exception as error:  # a cell that fails is a result, and the others go on
            return failed(task, error)
        return Finished(task)

    def close(self) -> None:
        self.waiting.clear()


def failed(task: Task, error: Exception) -> Finished:
    kind = type(error).__name__
    words = str(error) if isinstance(error, StepquantError) else f"{kind}: {error}"
    return Finished(task, words or kind, kind)
