"""An engine that is wrong by a known share, or does not run at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from benchmarks.engines.given import Given


def prepare(given: Given, share: float) -> None:
    if share < 0:
        raise ImportError("there is no such engine\nand more about it")
    given.own.mkdir()
    (given.own / "weights").write_bytes(bytes(1000))


def load(given: Given, share: float) -> Callable[[Any], NDArray[Any]]:
    return lambda arrays: arrays["x"] * (1 + share)
