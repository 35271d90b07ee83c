"""Which tensors are in memory of a process's own, and not in files."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


def in_memory(tensors: Iterable[Tensor]) -> int:
    """Bytes of those that lie in no file; what shares memory counts once."""
    inside = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, *_, name = line.split(maxsplit=5)
        if ".safetensors" in name or "mapped-" in name:
            inside.append([int(end, 16) for end in ends.split("-")])
    own = {one.data_ptr(): one.nbytes for one in tensors}
    return sum(size for place, size in own.items() if not any(a <= place < b for a, b in inside))


def all_tensors() -> list[Tensor]:
    return [one for one in gc.get_objects() if issubclass(type(one), Tensor) and not one.is_meta]
