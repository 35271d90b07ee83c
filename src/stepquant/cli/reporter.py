"""Reporter: progress of long jobs on a terminal, in a log file, or nowhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Line:
    """A job that is told of in lines."""

    label: str
    total: int | None
    start: float
    last: float  # when it was told of
    done: int = 0

    def text(self, words: str) -> str:
        left = ""
        if self.total and self.done:
            left = f", {clock((time.monotonic() - self.start) / self.done * (self.total - self.done))} left"
        return f"{self.label}: {self.done}/{self.total or '?'}{left}{words and f' ({words})'}"


class Reporter:
    """Bars with the time left on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, console: Console, quiet: bool = False, brief: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.brief = brief  # bars vanish when they are full: for jobs with hundreds of them
        self.bars: Bars | None = None
        self.tasks: list[TaskID] = []
        self.lines: list[Line] = []
        self.words = ""

    def __enter__(self) -> Reporter:
        if self.console.is_terminal and not self.quiet:
            columns = (
                TextColumn("[progress.description]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[words]}"),
            )
            self.bars = Bars(*columns, console=self.console)
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        count = total if total is not None else len(items) if isinstance(items, Sized) else None
        if count == 0 or self.quiet:
            yield from items
        elif self.bars is not None:
            yield from self.draw(self.bars, items, label, count)
        else:
            yield from self.write(items, label, count)

    def note(self, words: str) -> None:
        if self.bars is not None and self.tasks:
            self.words = words
            self.bars.update(self.tasks[-1], words=words)
        elif self.lines:
            self.words = words
            self.tell(self.lines[-1])
        elif words:  # about no item, so that nothing would show it
            self.say(words)

    def tell(self, line: Line) -> None:
        """Not more often than every few seconds."""
        now = time.monotonic()
        if now - line.last >= SECONDS_BETWEEN_LINES and line.done != line.total:
            self.say(line.text(self.words))
            line.last = now

    def draw(self, bars: Bars, items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
        task = bars.add_task(label, total=total, words="")
        self.tasks.append(task)
        try:
            for item in items:
                yield item
                bars.update(task, advance=1)
        finally:
            self.tasks.remove(task)
            bars.update(task, words="", visible=not self.brief)
        self.words = ""

    def write(self, items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
        start = time.monotonic()
        line = Line(label, total, start, start)
        self.lines.append(line)
        try:
            for item in items:
                yield item
                line.done += 1
                self.tell(line)
        finally:
            self.lines.remove(line)
        self.say(f"{label}: done in {clock(time.monotonic() - start)}")
        self.words = ""

    def say(self, words: str) -> None:
        """One line for the user, above the bars if there are any."""
        if not self.quiet:
            self.console.print(words, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
