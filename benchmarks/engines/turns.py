"""Engines in processes of their own, which take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

LOG, ROOT = "log.txt", Path(__file__).parents[2]
SILENT = {"CI": "true"}  # OpenVINO and NNCF report to their makers, and wait for a network to do so


class EngineError(Exception):
    """Why an engine has no figures, in one line."""


class Process:
    """A worker that has loaded an engine, or tries to prepare it."""

    def __init__(self, job: Mapping[str, Any], python: str) -> None:
        log = Path(job["folder"]) / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(job["threads"])
        with log.open("a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [python, "-W", "ignore", "-m", "benchmarks.engines.worker", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ
                | SILENT
                | {
                    "OMP_NUM_THREADS": threads,
                    "MKL_NUM_THREADS": threads,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                },
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # no more lines: it ends

    def heard(self) -> dict[str, Any]:
        """The next line that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"the process ended with {self.process.wait()}")
        told: dict[str, Any] = json.loads(line)
        if "failed" in told:
            raise EngineError(told["failed"])
        return told

    def call(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it says is why
        return self.heard()


@dataclass
class Played:
    """Seconds by round, the most memory of a call, and who gave up on the way and why."""

    taken: list[dict[str, float]]
    peaks: dict[str, int]
    lost: dict[str, EngineError]


def rounds(processes: Mapping[str, Process], count: int) -> Played:
    """Every one once a round; the order rotates."""
    played = Played([], dict.fromkeys(processes, 0), {})
    for number in range(count):
        names = [name for name in processes if name not in played.lost]
        turn, seconds = number % len(names), {}
        for name in names[turn:] + names[:turn]:
            try:
                told = processes[name].call()
            except EngineError as error:
                played.lost[name] = error
                continue
            seconds[name] = told["seconds"]
            played.peaks[name] = max(played.peaks[name], told["peak"])
        played.taken.append(seconds)
    return played


def spread(values: Sequence[float]) -> list[float]:
    """Median, least, largest."""
    return [statistics.median(values), min(values), max(values)]
