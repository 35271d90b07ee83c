"""A lock for models that keep something between calls (recorded calls, the selected row of ranges)."""

from __future__ import annotations

from threading import RLock


class Turns:
    """A lock that is copied and sent to other processes as a fresh one."""

    def __init__(self) -> None:
        self.lock = RLock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()
