"""A worker process: reads tasks from its input, performs them, and tells how far it is in lines of JSON."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeVar

import torch

from stepquant.job.compare.executor import failed
from stepquant.job.compare.tasks import read_task

T = TypeVar("T")
SECONDS_BETWEEN_TICKS = 0.2


class Telling:
    """Progress that is written down for the parent."""

    def __init__(self, out: IO[str]) -> None:
        self.out, self.started, self.words = out, 0, ""

    def tell(self, event: dict[str, Any]) -> None:
        self.out.write(json.dumps(event) + "\n")
        self.out.flush()

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        number = self.started = self.started + 1
        self.tell({"start": number, "label": label, "total": total})
        last, done = time.monotonic(), 0
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() - last > SECONDS_BETWEEN_TICKS:
                self.tell({"tick": number, "count": done, "words": self.words})
                last = time.monotonic()
        self.tell({"end": number, "count": done})
        self.words = ""  # they are about these items

    def note(self, words: str) -> None:
        self.words = words


def main() -> None:
    """Perform one task after the other; what fails is told, and the next one may come."""
    telling = Telling(os.fdopen(os.dup(sys.stdout.fileno()), "w"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever others print goes into the log
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=listen, args=(lines,), daemon=True).start()
    while True:
        threads, text = json.loads(lines.get())
        if threads:
            torch.set_num_threads(threads)
        task = read_task(text)
        try:
            task.perform(telling)
        except Exception as error:  # the border of the process
            traceback.print_exc()
            found = failed(task, error)
            telling.tell({"done": False, "error": found.error, "kind": found.kind})
        else:
            telling.tell({"done": True})


def listen(lines: queue.Queue[str]) -> None:
    """The parent holds our input open as long as it lives and wants us."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
