"""torch itself: eager, and compiled with frozen weights.

Compiling is part of the preparation: what it made lies in a cache beside the files, from which an interrupted one goes on
and a later process takes it.
"""

from __future__ import annotations

import os
import time

import torch
from torch import nn
from torch._inductor import config

from benchmarks.engines.given import Given
from benchmarks.engines.subject import Network, Run, read, running, save

LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
CHOICE = "layout"


def prepare(given: Given, dtype: str, compiled: bool = False) -> None:
    """Its files in that type; eager in the layout in which a second call takes less time, the compiler chooses its own."""
    kind = getattr(torch, dtype)
    model = read(given.model, given.network, kind)
    save(model, given.own)
    if compiled:
        del model
        load(given, dtype, compiled)(given.calls()[0])
        return
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
    kind = getattr(torch, dtype)
    model = read(given.own, given.network, kind)
    if compiled:
        return running(frozen(given, Network(model, given.network)), kind)
    layout = LAYOUTS[(given.own / CHOICE).read_text()]
    return running(Network(model.to(memory_format=layout), given.network), kind)


def frozen(given: Given, model: nn.Module) -> nn.Module:
    """A network as inductor compiles it in this one process, its weights constants."""
    # Without blanks: the name is not quoted for the compiler.
    cache = f"{given.folder.name}-{given.network}.cache".replace(" ", "-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(given.folder.with_name(cache))
    # As an option of torch.compile it comes too late for Dynamo, and nothing is frozen.
    config.freezing = True
    config.compile_threads = 1
    return torch.compile(model, dynamic=False)
