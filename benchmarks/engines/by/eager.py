"""torch itself: eager, and compiled with frozen weights."""

from __future__ import annotations

import time

import torch

from benchmarks.engines.given import Given
from benchmarks.engines.subject import Network, Run, read, running, save

LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
CHOICE = "layout"


def prepare(given: Given, dtype: str) -> None:
    """Its files in that type, and the layout in which a second call takes less time."""
    kind = getattr(torch, dtype)
    model = read(given.model, given.network, kind)
    save(model, given.own)
    taken = {}
    for name, layout in LAYOUTS.items():
        run = running(Network(model.to(memory_format=layout), given.network), kind)
        for call in given.calls()[:1] * 2:
            began = time.process_time()
            run(call)
            taken[name] = time.process_time() - began
    (given.own / CHOICE).write_text(min(taken, key=taken.__getitem__))


def load(given: Given, dtype: str, compiled: bool = False) -> Run:
    torch.set_num_threads(given.threads)
    kind, layout = getattr(torch, dtype), LAYOUTS[(given.own / CHOICE).read_text()]
    model = Network(read(given.own, given.network, kind).to(memory_format=layout), given.network)
    if not compiled:
        return running(model, kind)
    return running(torch.compile(model, dynamic=False, options={"freezing": True}), kind)
