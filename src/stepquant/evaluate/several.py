"""Results of several denoisers, which share the steps of one pipeline, as those of one: paths begin with their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepquant.evaluate.trajectory.probe import Trace

Rows = list[dict[str, Any]]


def named(parts: Sequence[tuple[str, Rows]]) -> Rows:
    """The rows of all components; where there is one, its name goes without saying."""
    if len(parts) == 1:
        return parts[0][1]
    return [row | {"path": f"{name}.{row['path']}"} for name, rows in parts for row in rows]


def text_of(parts: Sequence[tuple[str, str]]) -> str:
    """What is said of each component, in one line."""
    if len(parts) == 1:
        return parts[0][1]
    return ", ".join(f"{name}: {text}" for name, text in parts)


def sizes(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes of all of them."""
    stored, plain = (sum(part[key] for part in parts) for key in ("bytes", "float_bytes"))
    return {"float_bytes": plain, "bytes": stored, "ratio": stored / plain}


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
