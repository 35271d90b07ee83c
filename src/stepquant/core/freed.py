"""Memory that was freed, and that the allocator of C keeps for itself."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Let the system have it, where the allocator can: tensors of many sizes leave holes that later ones do not fill."""
    trim = trimming()
    if trim is not None:
        trim(0)


@cache
def trimming() -> Any:
    """glibc's `malloc_trim`; None where there is none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
