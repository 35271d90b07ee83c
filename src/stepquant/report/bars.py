"""A bar chart of a benchmark as an SVG file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from stepquant.calib.cache import atomically
from stepquant.report.chart import LETTER, Frame, axes

OURS = "stepquant"
# Colours and not the page's variables: programs that show a file often know no variables.
STYLE = (
    "<style>text{font:12px sans-serif;fill:#62666b}.rule{stroke:#e3e0d8}.axis,.mark,.whisker{stroke:#62666b}"
    ".theirs{stroke:#fff}.ours{fill:#0f6e63}</style>"
)
SHARE = 0.8  # of the room of a batch size that its bars fill


def write_bars(speed: Mapping[str, Any], file: Path) -> None:
    """How many times faster than the reference each contender is, with its quartiles, for each batch size."""
    drawn = draw(speed)
    atomically(file, lambda temporary: temporary.write_text(drawn, encoding="utf-8"))


def draw(speed: Mapping[str, Any]) -> str:
    rows = [row for row in speed["rows"] if row["ratio"] is not None]
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["name"] for row in rows))
    highest = max((row["ratio_high"] for row in rows), default=1.0)
    right = 40 + round(LETTER * max(map(len, names), default=0))
    size = (70 + 200 * len(batches) + right, 340)
    frame = Frame(*size, (-0.5, len(batches) - 0.5), (0.0, 1.1 * highest), right=right)
    about = f"times faster than {speed['reference']}"
    title = f"one call of the denoiser, {speed['threads']} threads"
    parts = axes(frame, title, about, [(place, f"batch {batch}") for place, batch in enumerate(batches)])
    fills = {name: fill(name, place, len(names)) for place, name in enumerate(names)}
    for row in rows:
        beside = SHARE * ((names.index(row["name"]) + 0.5) / len(names) - 0.5)
        parts.append(bar(frame, row, batches.index(row["batch"]) + beside, SHARE / len(names), fills))
    for place, name in enumerate(names):
        x, y = frame.width - right + 14, frame.top + 18 * place
        parts.append(f'<rect {fills[name]} x="{x}" y="{y}" width="10" height="10"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 9}">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(about)}">{STYLE}'
        f'<rect fill="#fff" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def fill(name: str, place: int, count: int) -> str:
    """Ours has a colour, the others are greys."""
    grey = round(205 - 125 * place / count)
    return 'class="ours"' if name == OURS else f'class="theirs" fill="rgb({grey},{grey},{grey})"'


def bar(frame: Frame, row: Mapping[str, Any], middle: float, width: float, fills: Mapping[str, str]) -> str:
    """A bar, its number above it and its quartiles as a whisker."""
    left, right, x = (frame.px(middle + share * width) for share in (-0.46, 0.46, 0))
    top, low, high, base = map(frame.py, (row["ratio"], row["ratio_low"], row["ratio_high"], 0.0))
    return (
        f'<rect {fills[row["name"]]} x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{base - top:.1f}"/>'
        f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        f'<text x="{x:.1f}" y="{high - 4:.1f}" text-anchor="middle">{row["ratio"]:.1f}</text>'
    )
