"""A bar chart of a benchmark as a file of its own, SVG or PNG by its name."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stepquant.calib.cache import atomically

OURS = "stepquant"


def write_bars(speed: Mapping[str, Any], file: Path) -> None:
    """How many times faster than the reference each contender is, with its quartiles, for each batch size."""
    rows = [row for row in speed["rows"] if row["ratio"] is not None]
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(2.2 + 2.4 * len(batches), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        mine = {row["batch"]: row for row in rows if row["name"] == name}
        spots = [i + (place - (len(names) - 1) / 2) * width for i, b in enumerate(batches) if b in mine]
        heights = [mine[b]["ratio"] for b in batches if b in mine]
        below = [mine[b]["ratio"] - mine[b]["ratio_low"] for b in batches if b in mine]
        above = [mine[b]["ratio_high"] - mine[b]["ratio"] for b in batches if b in mine]
        bars = axes.bar(
            spots,
            heights,
            0.92 * width,
            yerr=[below, above],
            label=name,
            color="#c2410c" if name == OURS else str(0.8 - 0.5 * place / max(len(names), 1)),
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel(f"times faster than {speed['reference']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title(f"one call of the denoiser, {speed['threads']} threads", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file.suffix.lstrip(".") or "svg", dpi=150)
    atomically(file, lambda temporary: temporary.write_bytes(buffer.getvalue()))
