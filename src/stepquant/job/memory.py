"""Peak memory of this process, as the system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Most bytes that were resident at once since the process began (or since `reset_peak`)."""
    # Not getrusage where it can be helped: Linux hands a child the peak of the parent it was forked from.
    found = status_bytes("VmHWM")
    if found is None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return found


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def status_bytes(name: str) -> int | None:
    """A line of what the system says of this process: psutil has no peak on Linux, and none that can be reset."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def reset_peak() -> None:
    """Count anew from here, where the system can: for runs that share a process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
