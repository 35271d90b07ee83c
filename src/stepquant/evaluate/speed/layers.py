"""Milliseconds of every layer inside calls of the model, float and integer calls in turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from stepquant.errors import EvaluationError
from stepquant.evaluate.twins import Twins
from stepquant.models.call import Asked
from stepquant.models.hooks import first_arguments, removing
from stepquant.progress import Progress, Silent
from stepquant.runtime.lower import prepare

WARMING = 2


def layer_times(
    twins: Twins,
    *,
    batch: int = 8,
    rounds: int = 15,
    prompts: Sequence[Asked] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rows {path, integer, milliseconds}: the median over rounds, each layer by itself, without its fusions.

    What fusing saves belongs to no layer alone and is left out, for both.
    """
    paths = tuple(twins.source.sites())
    arguments = first_arguments(twins.float, batch, prompts, twins.quantized)
    plain = prepare(copy.deepcopy(twins.other.model), fuse=False)
    models = {False: twins.source.model, True: plain}
    taken: dict[tuple[str, bool], list[float]] = {}
    turns = (progress or Silent()).track(range(WARMING + rounds), "timing layers", WARMING + rounds)
    for turn in turns:
        for integer, model in models.items():
            with torch.no_grad(), clocks(model, paths) as found:
                model(**arguments, return_dict=False)
            if turn >= WARMING:
                for path, milliseconds in found.items():
                    taken.setdefault((path, integer), []).append(milliseconds)
    rows = [
        {"path": path, "integer": integer, "milliseconds": statistics.median(values)}
        for (path, integer), values in taken.items()
    ]
    return {"format": 1, "batch": batch, "threads": torch.get_num_threads(), "rounds": rounds, "rows": rows}


@contextmanager
def clocks(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, float]]:
    """Milliseconds of each layer in the calls inside, by path."""
    found: dict[str, float] = {}
    begun: dict[str, float] = {}
    modules = dict(model.named_modules())

    def begin(path: str) -> Any:
        return lambda _, __: begun.update({path: time.perf_counter()})

    def end(path: str) -> Any:
        def hook(*_: Any) -> None:
            found[path] = found.get(path, 0.0) + 1000 * (time.perf_counter() - begun[path])

        return hook

    with ExitStack() as stack:
        for path in paths:
            if path in modules:
                stack.enter_context(removing(modules[path].register_forward_pre_hook(begin(path))))
                stack.enter_context(removing(modules[path].register_forward_hook(end(path))))
        yield found


def read_times(data: Mapping[str, Any]) -> dict[tuple[str, bool], float]:
    """Milliseconds by path and whether in integers."""
    try:
        found = {(str(row["path"]), bool(row["integer"])): float(row["milliseconds"]) for row in data["rows"]}
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"this is no table of layer times: {type(error).__name__} {error}",
            expected="a file that `stepquant layers` wrote",
        ) from error
    if not all(value >= 0 for value in found.values()):
        raise EvaluationError("a layer cannot take negative time", fix="time the layers again")
    return found
