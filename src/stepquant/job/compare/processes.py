"""Tasks in processes of their own: a clean measure of memory, and a crash that takes nothing else with it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from stepquant.job.compare.executor import Finished
from stepquant.job.compare.tasks import Quantize, Task
from stepquant.job.files import writing
from stepquant.job.recipe import IN_FULL
from stepquant.progress import Progress, Silent

WORKER = "stepquant.job.compare.worker"
LOG = "log.txt"


@dataclass
class Worker:
    """A process, what it works on, and the bars that show how far it is."""

    process: subprocess.Popen[str]
    task: Task
    bars: dict[int, tuple[Iterator[Any], int]] = field(default_factory=dict)

    def send(self, threads: int | None, task: Task) -> None:
        self.task = task
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its death is told by the end of its output
            self.process.stdin.write(json.dumps([threads, task.model_dump_json(context=IN_FULL)]) + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Processes:
    """`workers` processes at once, with their share of the processor's cores; each quantization has a fresh one."""

    def __init__(
        self, workers: int = 1, progress: Progress | None = None, threads: int | None = None
    ) -> None:
        self.slots, self.progress = workers, progress or Silent()
        self.threads = threads or (None if workers == 1 else max((os.cpu_count() or 1) // workers, 1))
        self.events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self.busy: dict[int, Worker] = {}
        self.idle: list[Worker] = []

    def start(self, task: Task) -> None:
        if isinstance(task, Quantize) or not self.idle:
            for worker in self.idle:
                worker.stop()
            self.idle.clear()
            worker = self.launch(task)
        else:
            worker = self.idle.pop()
        self.busy[worker.process.pid] = worker
        worker.send(self.threads, task)

    def launch(self, task: Task) -> Worker:
        settings = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        with writing(task.out):
            task.out.mkdir(parents=True, exist_ok=True)
            log = (task.out / LOG).open("w", encoding="utf-8")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | settings,
            )
        threading.Thread(target=self.listen, args=(process,), daemon=True).start()
        return Worker(process, task)

    def listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.events.put((process.pid, json.loads(line)))
        process.wait()
        self.events.put((process.pid, None))

    def wait(self) -> Finished:
        while True:
            pid, event = self.events.get()
            worker = self.busy.get(pid)
            if worker is None:  # an idle one that was stopped
                continue
            if event is not None and "done" not in event:
                self.follow(worker, event)
                continue
            for bar, _ in worker.bars.values():
                close(bar)
            worker.bars.clear()
            del self.busy[pid]
            if event is None:
                return Finished(worker.task, death(worker.process.returncode), "Died", died=True)
            self.idle.append(worker)
            return Finished(worker.task, event.get("error", ""), event.get("kind", ""))

    def follow(self, worker: Worker, event: dict[str, Any]) -> None:
        """Draw what the process tells."""
        if "start" in event:
            total = event["total"]
            label = f"{worker.task.title}: {event['label']}"
            bar = iter(self.progress.track(repeat(None) if total is None else range(total), label, total))
            next(bar, None)
            worker.bars[event["start"]] = (bar, 0)
            return
        number = int(event.get("tick") or event["end"])
        bar, shown = worker.bars[number]
        self.progress.note(event.get("words", ""))
        exhaust(bar, event["count"] - shown)
        worker.bars[number] = (bar, event["count"])
        if "end" in event:
            close(worker.bars.pop(number)[0])

    def close(self) -> None:
        for worker in (*self.busy.values(), *self.idle):
            worker.stop()
        self.busy.clear()
        self.idle.clear()


def exhaust(bar: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(bar, None)


def close(bar: Iterator[Any]) -> None:
    """The reporter says that it is done when its items end."""
    getattr(bar, "close", lambda: None)()


def death(code: int) -> str:
    """Why a process ended without a word."""
    if code >= 0:
        return f"the worker process ended with code {code}; see {LOG} in the folder of the run"
    name = signal.Signals(-code).name
    hint = ": out of memory?" if name == "SIGKILL" else ""
    return f"the worker process was killed by {name}{hint}"
