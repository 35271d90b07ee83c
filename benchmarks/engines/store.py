"""What was measured, a row for each case and engine in one file of JSON; and the table of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TITLES = {"unet": "U-Net", "vae": "decoder", "picture": "LCM picture"}
HEADER = ["engine", "8 bits", "seconds", "times fp32", "peak GB", "of calls", "size GB", "error"]


@dataclass(frozen=True)
class Store:
    file: Path

    def rows(self) -> dict[str, Row]:
        if not self.file.is_file():
            return {}
        found: dict[str, Row] = json.loads(self.file.read_text(encoding="utf-8"))
        return found

    def has(self, case: str, engine: str) -> bool:
        """Measured, so that it need not be measured again; what failed is tried again."""
        return "seconds" in self.rows().get(key(case, engine), {})

    def put(self, case: str, engine: str, row: Row) -> None:
        """A figure never makes place for a failure."""
        rows = self.rows()
        if "seconds" in row or "seconds" not in rows.get(key(case, engine), {}):
            rows[key(case, engine)] = row
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        os.replace(part, self.file)


def key(case: str, engine: str) -> str:
    return f"{case} / {engine}"


def table(rows: Mapping[str, Row], case: str, engines: Iterable[tuple[str, str]]) -> str:
    """The engines of a case in their order; those without figures say why."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for name, bits in engines:
        row = rows.get(key(case, name))
        if row is not None:
            lines.append([name, bits, *cells(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Row) -> list[str]:
    if "seconds" not in row:
        return [f"no: {row['failed']}", *[""] * (len(HEADER) - 3)]
    seconds, (ratio, low, high) = row["seconds"], row["ratio"]
    sizes = [f"{row[name] / 1e9:.2f}" for name in ("peak", "peak_of_calls", "size")]
    error = "" if row["error"] is None else f"{row['error']:.2%}"
    return [f"{seconds[0]:.2f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})", *sizes, error]
