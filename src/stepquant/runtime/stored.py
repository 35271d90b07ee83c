"""Modules whose tensors stand for bytes on disk."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any, Self

from torch import Tensor, nn

PAGE_OUT = 21  # Linux since 5.4; Python has no name for it


class Stored(nn.Module):
    """Buffers that move with the model, and keep the dtypes they have on disk when it is cast."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        former = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in former.items():
            now = self._buffers[name]
            if value is not None and now is not None and now.dtype != value.dtype:
                self._buffers[name] = value.to(now.device)
        return self


def forget_loaded(module: nn.Module, _keys: object) -> None:
    """What loading a state dict does to what was derived from the former one."""
    module.forget()  # type: ignore[operator]


def not_needed_soon(tensor: Tensor) -> None:
    """Let the system take back the memory of bytes that were read from a file, until they are asked for again.

    They stay true whatever happens: pages that were written to are no longer those of the file, and are kept.
    """
    advise = page_advice()
    if advise is None or not tensor.is_cpu or not tensor.is_contiguous():
        return
    begin, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), PAGE_OUT)  # mere advice: it may fail


@cache
def page_advice() -> Any:
    """The system's `madvise`; None where there is none."""
    try:
        return ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        return None
