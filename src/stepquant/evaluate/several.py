"""Results of several denoisers, which share the steps of one pipeline, as those of one: paths begin with their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
