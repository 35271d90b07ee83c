"""Memory that is not needed any more: tensors that go early, and what the allocator of C keeps for itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

APART, TRIMMED = -3, -1  # glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
LARGE = 5 << 20  # bytes: more than a slice of a tensor that is never there at once
MOST = 1 << 25  # up to which glibc raises the first by itself, and the second to twice as much
CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def empty(weight: nn.Parameter) -> None:
    """Let its numbers go. Shape, dtype and device stay, and who reads it all the same finds NaN."""
    weight.data = weight.new_full((), torch.nan).expand(weight.shape)


@contextmanager
def large_ones_apart() -> Iterator[None]:
    """What is large gets memory of its own meanwhile, which goes back with it, where the allocator can.

    Between small things that last, large ones leave holes in which the next ones do not fit: given back by `trim`, they
    are no memory, but limits of a process count them.
    """
    choose = of_allocator("mallopt")
    if choose is None or any(name in os.environ for name in CHOSEN):
        yield
        return
    choose(APART, LARGE)
    try:
        yield
    finally:
        choose(APART, MOST)
        choose(TRIMMED, 2 * MOST)


def trim() -> None:
    """Let the system have it, where the allocator can: tensors of many sizes leave holes that later ones do not fill."""
    give_back = of_allocator("malloc_trim")
    if give_back is not None:
        give_back(0)


@cache
def of_allocator(name: str) -> Any:
    """One of glibc's functions; None where there is no such allocator."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
