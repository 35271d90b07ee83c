"""Large tensors between small ones that last: what limits of a process count of them once they are gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stepquant.core import freed

TOY = """
import ctypes
import torch
from stepquant.core.freed import large_ones_apart, trim
from stepquant.job.memory import status_bytes

class Counts(ctypes.Structure):  # mallinfo(3)
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uord ford keep".split()]

allocator = ctypes.CDLL(None)
allocator.mallinfo.restype = Counts

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

def apart(size):
    before = allocator.mallinfo().hblks
    large = torch.ones(size)
    return allocator.mallinfo().hblks - before

torch.empty(1 << 22)  # the allocator keeps ever larger ones once such are freed
before = status_bytes("VmData")
with large_ones_apart():
    kept = pass_over(20, 3 << 20)
    during = apart(3 << 20)
print((status_bytes("VmData") - before) / (12 << 20), during, apart(3 << 20))
"""
CHOSEN = {"MALLOC_MMAP_THRESHOLD_": str(freed.MOST), "MALLOC_TRIM_THRESHOLD_": str(2 * freed.MOST)}


def after_a_pass(chosen: dict[str, str]) -> list[float]:
    """What is counted after a pass over twenty layers, in layers; large tensors apart from the others, meanwhile and later."""
    free = {name: value for name, value in os.environ.items() if name not in freed.CHOSEN}
    words = [sys.executable, "-W", "ignore", "-c", TOY]
    done = subprocess.run(words, capture_output=True, text=True, env=free | {"OMP_NUM_THREADS": "1"} | chosen)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(freed.of_allocator("mallopt") is None, reason="another allocator than glibc's")
def test_large_ones_leave_no_holes() -> None:
    grown, meanwhile, later = after_a_pass({})
    assert grown < 2
    assert (meanwhile, later) == (1, 0)  # kept for the next, as ever


@pytest.mark.skipif(freed.of_allocator("mallopt") is None, reason="another allocator than glibc's")
def test_who_has_chosen_keeps_it() -> None:
    assert after_a_pass(CHOSEN)[1:] == [0, 0]
