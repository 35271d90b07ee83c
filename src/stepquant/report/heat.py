"""Heat maps of how much single sites hurt: sites down, bits across, the worst first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HIGHER_IS_BETTER = ("psnr", "ssim")
MOST_ROWS = 30  # in full; the others fold away


@dataclass(frozen=True)
class HeatRow:
    """One site: what it is, and for each number of bits the value with its colour in percent."""

    path: str
    role: str
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class HeatMap:
    """One metric."""

    metric: str
    better: str
    bits: tuple[int, ...]
    worst: tuple[HeatRow, ...]
    others: tuple[HeatRow, ...]


def heat_maps(rows: Sequence[Mapping[str, Any]]) -> list[HeatMap]:
    """A map for each metric of a study of single sites: rows {path, role, bits, metric, value}, `port` where it is known."""
    return [
        heat_map(metric, [row for row in rows if row["metric"] == metric])
        for metric in dict.fromkeys(row["metric"] for row in rows)
    ]


def heat_map(metric: str, rows: Sequence[Mapping[str, Any]]) -> HeatMap:
    bits = sorted({int(row["bits"]) for row in rows})
    sites: dict[tuple[str, str], dict[int, float | None]] = {}
    for row in rows:
        site = (" ".join(str(row[key]) for key in ("path", "port") if row.get(key)), str(row["role"]))
        sites.setdefault(site, {})[int(row["bits"])] = row["value"]
    higher = metric in HIGHER_IS_BETTER
    known = [value for found in sites.values() for value in found.values() if value is not None]
    harm = {value: harm_of(value, higher) for value in known}
    low, high = min(harm.values(), default=0.0), max(harm.values(), default=1.0)

    def cell(value: float | None) -> tuple[str, str]:
        if value is None:
            return "–", "0"
        share = (harm[value] - low) / (high - low) if high > low else 0.0
        return f"{value:.3g}", f"{100 * share:.0f}"

    def worst(found: Mapping[int, float | None]) -> float:
        return max((harm[value] for value in found.values() if value is not None), default=-math.inf)

    ordered = sorted(sites.items(), key=lambda item: -worst(item[1]))
    made = [HeatRow(*site, tuple(cell(found.get(width)) for width in bits)) for site, found in ordered]
    better = "higher" if higher else "lower"
    return HeatMap(metric, better, tuple(bits), tuple(made[:MOST_ROWS]), tuple(made[MOST_ROWS:]))


def harm_of(value: float, higher: bool) -> float:
    """How bad a value is, on a scale that spreads small ones."""
    return -value if higher else math.log10(max(value, 1e-12))
