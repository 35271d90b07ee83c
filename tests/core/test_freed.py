"""Large tensors between small ones that last: what limits of a process count of them once they are gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stepquant.core import freed

TOY = """
import torch
from stepquant.core.freed import large_ones_apart, trim
from stepquant.job.memory import status_bytes

def pass_over(layers, size):
    lasting = []
    for _ in range(layers):
        weight = torch.ones(size)
        rounded = weight * 2
        lasting.append(torch.ones(100))
        del weight
        rounded = rounded + 1
        lasting.append(torch.ones(4))
        del rounded
        trim()
    return lasting

def counted():
    return status_bytes("VmData")

torch.empty(1 << 23)  # the allocator keeps ever larger ones once such are freed
before = counted()
with large_ones_apart():
    kept = pass_over(20, 3 << 20)
grown, before = counted() - before, counted()
again = torch.ones(3 << 20)
del again
print(grown / (12 << 20), (counted() - before) / (12 << 20))
"""
CHOSEN = {"MALLOC_MMAP_THRESHOLD_": str(freed.MOST), "MALLOC_TRIM_THRESHOLD_": str(2 * freed.MOST)}


def grown(chosen: dict[str, str]) -> list[float]:
    """What is counted after a pass over twenty layers, and what of a tensor that came and went later; in layers."""
    free = {name: value for name, value in os.environ.items() if name not in freed.CHOSEN}
    words = [sys.executable, "-W", "ignore", "-c", TOY]
    done = subprocess.run(words, capture_output=True, text=True, env=free | {"OMP_NUM_THREADS": "1"} | chosen)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(freed.of_allocator("mallopt") is None, reason="another allocator than glibc's")
def test_large_ones_leave_no_holes() -> None:
    during, later = grown({})
    assert during < 2
    assert later > 0.9  # kept for the next, as ever


@pytest.mark.skipif(freed.of_allocator("mallopt") is None, reason="another allocator than glibc's")
def test_who_has_chosen_keeps_it() -> None:
    during, _ = grown(CHOSEN)
    assert during > 10
