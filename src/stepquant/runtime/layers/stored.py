"""Modules whose tensors stand for bytes on disk."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from functools import cache
from operator import is_
from typing import Any, Self

import torch
from torch import Tensor, nn

OFFLOADED = "_hf_hook"  # accelerate's hook, which brings a module's tensors for the time of its call

PAGE_OUT = 21  # Linux since 5.4; Python has no name for it


class Stored(nn.Module):
    """Buffers that move with the model, and keep the dtypes they have on disk when it is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor] = []  # the buffers that something was derived from
        self.versions: list[int] = []

    def remember(self) -> None:
        """From now on tell whether the buffers are still what they are now."""
        self.read = [buffer for buffer in self._buffers.values() if buffer is not None]
        self.versions = versions_of(self.read)

    def edited(self) -> bool:
        """Whether a buffer was written to or replaced since; who offloads replaces them by the same numbers."""
        if torch.compiler.is_compiling() or OFFLOADED in self.__dict__:
            return False
        now = [buffer for buffer in self._buffers.values() if buffer is not None]
        same = len(now) == len(self.read) and all(map(is_, now, self.read))
        return not same or versions_of(now) != self.versions

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        former = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in former.items():
            now = self._buffers[name]
            if value is not None and now is not None and now.dtype != value.dtype:
                self._buffers[name] = value.to(now.device)
        return self


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written to; tensors of inference mode do not count that."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


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
