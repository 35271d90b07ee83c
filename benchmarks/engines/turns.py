"""Engines in processes of their own, which take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

LOG = "log.txt"
SILENT = {"CI": "true"}  # OpenVINO and NNCF report to their makers, and wait for a network to do so


class EngineError(Exception):
    """Why an engine has no figures, in one line."""


class Process:
    """A worker that has loaded an engine, or tries to prepare it."""

    def __init__(self, job: Mapping[str, Any], python: str) -> None:
        log = Path(job["folder"]) / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(job["threads"])
        self.log = log
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
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
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


def rounds(processes: Mapping[str, Process], count: int) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Seconds of each by round, whose order rotates, and the most memory of its calls."""
    names, taken = list(processes), []
    peaks = dict.fromkeys(names, 0)
    for number in range(count):
        turn, seconds = number % len(names), {}
        for name in names[turn:] + names[:turn]:
            told = processes[name].call()
            seconds[name] = told["seconds"]
            peaks[name] = max(peaks[name], told["peak"])
        taken.append(seconds)
    return taken, peaks


def spread(values: Sequence[float]) -> list[float]:
    """Median, least, largest."""
    return [statistics.median(values), min(values), max(values)]
