"""Meter: how long a job took that may have been killed on the way and gone on later."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from stepquant.job.compare.store import read_json, write_json
from stepquant.job.memory import peak_bytes
from stepquant.progress import Progress

T = TypeVar("T")
SECONDS_BETWEEN_NOTES = 5.0


class Meter:
    """Progress that keeps the seconds spent and the peak of memory in a file, and starts from what it finds there."""

    def __init__(self, progress: Progress, file: Path) -> None:
        self.progress, self.file = progress, file
        former = read_json(file) or {}
        self.former_seconds = float(former.get("seconds", 0.0))
        self.former_peak = int(former.get("peak_bytes", 0))
        self.start = self.noted = time.monotonic()

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        for item in self.progress.track(items, label, total):
            yield item
            if time.monotonic() - self.noted > SECONDS_BETWEEN_NOTES:
                self.finish()

    def note(self, words: str) -> None:
        self.progress.note(words)

    def finish(self) -> float:
        """Seconds of this attempt and of those before it."""
        self.noted = time.monotonic()
        seconds = self.former_seconds + self.noted - self.start
        peak = max(peak_bytes(), self.former_peak)
        write_json(self.file, {"seconds": seconds, "peak_bytes": peak})
        return seconds
