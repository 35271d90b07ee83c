"""The process of one engine: it prepares, or it loads and then makes a call for every line that it reads.

Nothing heavy is imported before the engine does it: its peak of memory is its own.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.given import NETWORKS, PICTURE, Given, inputs_of, relative_error

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Most bytes that were resident at once; asked here, since the package that knows it imports torch."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def loaded(job: dict[str, Any]) -> Callable[[], Any]:
    """The call of a case: one network on what was recorded, or the picture with all of them."""
    engine, given = importlib.import_module(job["module"]), Given.of(job)
    recorded = dict(np.load(given.test))
    if job["case"] != PICTURE:
        arrays = inputs_of(recorded)
        run = engine.load(given, **job["options"])
        return lambda: run(arrays)
    if hasattr(engine, "load_picture"):
        draw: Callable[[], Any] = engine.load_picture(given, **job["options"])
        return draw
    from benchmarks.engines import subject

    networks = {name: engine.load(given.named(name), **job["options"]) for name in NETWORKS}
    return lambda: subject.picture(networks, recorded["input_ids"], recorded["noise"], subject.TEST)


def clock_of(job: dict[str, Any]) -> Callable[[], float]:
    """Seconds of the processor where one thread computes, those of compilers that were called included."""

    def worked() -> float:
        called = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + called.ru_utime + called.ru_stime

    return worked if job["threads"] == 1 else time.perf_counter


def measure(job: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    clock = clock_of(job)
    wanted = np.load(Given.of(job).test)["wanted"]
    began = clock()
    call = loaded(job)
    out = call()
    first = clock() - began
    error = None if out is None else relative_error(out, wanted)
    if job["case"] != PICTURE:
        call()  # some engines record the second; within a picture the U-Net has had it
    say({"first": first, "error": error, "peak": peak_bytes()})
    RESET.write_text("5")  # counts anew
    for _ in sys.stdin:
        began = clock()
        call()
        say({"seconds": clock() - began, "peak": peak_bytes()})


def main(job: dict[str, Any]) -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not ours

    def say(what: dict[str, Any]) -> None:
        lines.write(json.dumps(what) + "\n")
        lines.flush()

    try:
        if job["prepare"]:
            clock = clock_of(job)
            began = clock()
            importlib.import_module(job["module"]).prepare(Given.of(job), **job["options"])
            say({"seconds": clock() - began, "peak": peak_bytes()})
        else:
            measure(job, say)
    except Exception as error:  # whatever an engine stumbles over is its row
        lines_of = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
        say({"failed": f"{type(error).__name__}: {lines_of[0][:200]}"})
        raise


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
