"""Traces of several denoisers, which share the steps of one pipeline, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepquant.evaluate.several import Rows, named
from stepquant.evaluate.trajectory.probe import Trace


def traces(parts: Sequence[tuple[str, Trace]]) -> Trace:
    """One trace along all steps, those of the first denoiser first.

    What has a number for every probed step stays out where there are several: no denoiser runs all of them.
    """
    if len(parts) == 1:
        return parts[0][1]
    steps: Rows = []
    blocks: list[tuple[str, Rows]] = []
    probed: dict[str, list[Any]] = {"steps": [], "t": []}
    count = sum(len(part.blocks["steps"]) for _, part in parts)
    for name, part in parts:
        before, start = len(probed["steps"]), len(steps)
        after = count - before - len(part.blocks["steps"])
        rows = part.blocks["rows"]
        blocks.append(
            (name, [row | {"sqnr": [None] * before + row["sqnr"] + [None] * after} for row in rows])
        )
        probed["steps"] += [start + step for step in part.blocks["steps"]]
        probed["t"] += part.blocks["t"]
        steps += [row | {"step": start + row["step"]} for row in part.steps]
    return Trace(steps, {**probed, "rows": named(blocks)}, [])
