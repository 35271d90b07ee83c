"""Modules whose tensors stand for bytes on disk."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


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
