"""Memory that is not needed any more: tensors that go early, and what the allocator of C keeps for itself."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import nn


def empty(weight: nn.Parameter) -> None:
    """Let its numbers go. Shape, dtype and device stay, and who reads it all the same finds NaN."""
    weight.data = weight.new_full((), torch.nan).expand(weight.shape)


def trim() -> None:
    """Let the system have it, where the allocator can: tensors of many sizes leave holes that later ones do not fill."""
    of_allocator = trimming()
    if of_allocator is not None:
        of_allocator(0)


@cache
def trimming() -> Any:
    """glibc's `malloc_trim`; None where there is none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
