"""Reporter: progress of long jobs on a terminal, in a log file, or nowhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Bars with the time left on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, console: Console, quiet: bool = False, brief: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.brief = brief  # bars vanish when they are full: for jobs with hundreds of them
        self.bars: Bars | None = None
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
        self.words = words

    def draw(self, bars: Bars, items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
        task = bars.add_task(label, total=total, words="")
        try:
            for item in items:
                yield item
                bars.update(task, advance=1, words=self.words)
        finally:
            bars.update(task, words="", visible=not self.brief)
        self.words = ""

    def write(self, items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
        start = last = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES and done != total:
                left = f", {clock((now - start) / done * (total - done))} left" if total else ""
                self.say(f"{label}: {done}/{total or '?'}{left}{self.words and f' ({self.words})'}")
                last = now
        self.say(f"{label}: done in {clock(time.monotonic() - start)}")
        self.words = ""

    def say(self, words: str) -> None:
        """One line for the user, above the bars if there are any."""
        if not self.quiet:
            self.console.print(words, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
