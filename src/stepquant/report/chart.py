"""Charts as inline SVG whose colours are the page's CSS variables, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

# Quality that differs by more than this factor is drawn on a logarithmic axis.
MOST_LINEAR = 8
# Width of a letter of a name in pixels.
LETTER = 6.6


@dataclass(frozen=True)
class Line:
    """One curve: its name, its CSS class, and its points."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Frame:
    """The plotting area in pixels and the ranges that it shows; y is logarithmic where `log` says so."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    log_x: bool = False
    left: int = 52
    right: int = 14
    top: int = 12
    bottom: int = 40

    def px(self, x: float) -> float:
        return self.left + fraction(x, self.x, self.log_x) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        return (
            self.height - self.bottom - fraction(y, self.y, self.log) * (self.height - self.top - self.bottom)
        )


def fraction(value: float, span: tuple[float, float], log: bool) -> float:
    low, high = (math.log10(end) for end in span) if log else span
    place = math.log10(max(value, span[0])) if log else value
    return 0.5 if high == low else min(max((place - low) / (high - low), 0), 1)


def log_span(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis at 1, 2 or 5 times a power of ten around all positive values."""
    positive = [value for value in values if value > 0] or [0.1, 1]
    ticks = log_ticks(min(positive) / 10, max(positive) * 10, (1, 2, 5))
    low = max((tick for tick in ticks if tick <= min(positive) * 1.0001), default=min(positive))
    high = min((tick for tick in ticks if tick >= max(positive) * 0.9999), default=max(positive))
    return (low, high) if high > low else (low, low * 10)


def log_ticks(low: float, high: float, marks: Sequence[int] = (1, 2, 5)) -> list[float]:
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    found = [mark * 10.0**power for power in powers for mark in marks]
    return [tick for tick in found if low * 0.9999 <= tick <= high * 1.0001]


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends, about `count` of them."""
    rough = (high - low) / max(count, 1) or 1
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / gap - 1e-9)
    return [index * gap for index in range(first, math.floor(high / gap + 1e-9) + 1)]


def linear_span(values: Sequence[float]) -> tuple[float, float]:
    """Round ends around all values, with zero where it is near."""
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < 0.35 * high else low
    room = (high - low or abs(high) or 1) * 0.08
    return low if low == 0 else low - room, high + room


def short(value: float) -> str:
    """A tick label of few characters."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def axes(
    frame: Frame, x_label: str, y_label: str, x_names: Sequence[tuple[float, str]] | None = None
) -> list[str]:
    """Rules, ticks and titles; `x_names` names places along x instead of numbers."""
    base, out = frame.height - frame.bottom, []
    narrow = frame.width < 500
    marks = (1, 2, 5) if frame.log and frame.y[1] / frame.y[0] < 300 else (1,)
    for tick in log_ticks(*frame.y, marks) if frame.log else linear_ticks(*frame.y):
        y = frame.py(tick)
        out.append(
            f'<line class="rule" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    ticks = log_ticks(*frame.x) if frame.log_x else linear_ticks(*frame.x, 4 if narrow else 8)
    for tick, name in x_names or [(tick, short(tick)) for tick in ticks]:
        x = frame.px(tick)
        out.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{escape(name)}</text>'
        )
    out.append(
        f'<line class="axis" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{base}" y2="{base}"/>'
    )
    middle = (frame.left + frame.width - frame.right) / 2
    out.append(
        f'<text class="label" x="{middle:.0f}" y="{frame.height - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if y_label:
        y = (frame.top + base) / 2
        out.append(
            f'<text class="label" transform="translate(11 {y:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        )
    return out


def curve(frame: Frame, line: Line) -> str:
    path = " ".join(
        f"{'L' if i else 'M'}{frame.px(x):.1f} {frame.py(y):.1f}" for i, (x, y) in enumerate(line.points)
    )
    return f'<path class="line {line.style}" d="{path}"/>'


def dots(frame: Frame, line: Line, labels: Sequence[str]) -> str:
    """The points of a line as dots that say their label under the pointer."""
    marks = [
        f'<circle class="dot {line.style}" cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="2.6"><title>{escape(label)}</title></circle>'
        for (x, y), label in zip(line.points, labels)
    ]
    return "".join(marks)


def svg(frame: Frame, parts: Sequence[str], about: str, style: str = "") -> str:
    return (
        f'<svg class="chart {style}" viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(about)}">'
        f"{''.join(parts)}</svg>"
    )


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, about: str, *, log: bool = True) -> str:
    """Curves over the denoising step, drawn twice: for a wide page and for a narrow one."""
    ys = [y for line in lines for _, y in line.points]
    xs = [x for line in lines for x, _ in line.points]
    span = log_span(ys) if log else linear_span(ys)
    out = []
    for width, height, style in ((920, 320, "wide"), (400, 270, "narrow")):
        frame = Frame(width, height, (min(xs), max(xs)), span, log)
        parts = axes(frame, x_label, y_label)
        for line in lines:
            labels = [f"{line.name}, step {x:.0f}: {y:.4g}" for x, y in line.points]
            parts += [curve(frame, line), dots(frame, line, labels)]
        out.append(svg(frame, parts, about, style))
    return "".join(out)


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot with its name, its CSS class and its shape."""

    name: str
    style: str
    x: float
    y: float
    shape: str = "circle"


def scatter(marks: Sequence[Mark], x_label: str, y_label: str, about: str, *, lower: bool = True) -> str:
    """Points, of which those that no other beats in both have names and a line; less is better along x, and along y if `lower`."""
    front = frontier(marks, lower=lower)
    ys = [mark.y for mark in marks]
    log = min(ys) > 0 and max(ys) / min(ys) > MOST_LINEAR
    span_x, span_y = linear_span([mark.x for mark in marks]), (log_span if log else linear_span)(ys)
    out = []
    for width, height, style in ((520, 360, "wide"), (400, 320, "narrow")):
        frame = Frame(width, height, span_x, span_y, log)
        stairs = " ".join(
            f"{'L' if index else 'M'}{frame.px(mark.x):.1f} {frame.py(mark.y):.1f}"
            for index, mark in enumerate(front)
        )
        line = f'<path class="front" d="{stairs}"/>'
        parts = [
            *axes(frame, x_label, y_label),
            line,
            *map(partial(spot, frame), marks),
            *names(frame, front),
        ]
        out.append(svg(frame, parts, about, style))
    return "".join(out)


def frontier(marks: Sequence[Mark], *, lower: bool = True) -> list[Mark]:
    """The marks that no other one beats in both directions, from left to right."""
    sign = 1 if lower else -1
    best, found = math.inf, []
    for mark in sorted(marks, key=lambda mark: (mark.x, sign * mark.y)):
        if sign * mark.y < best:
            found.append(mark)
            best = sign * mark.y
    return found


SHAPES = {
    "square": "-4.5,-4.5 4.5,-4.5 4.5,4.5 -4.5,4.5",
    "diamond": "0,-6.2 6.2,0 0,6.2 -6.2,0",
    "triangle": "0,-5.8 5.4,4.4 -5.4,4.4",
    "wedge": "0,5.8 5.4,-4.4 -5.4,-4.4",
}


def spot(frame: Frame, mark: Mark) -> str:
    """A dot that says who it is under the pointer."""
    label = f"<title>{escape(f'{mark.name}: {mark.x:.4g}, {mark.y:.4g}')}</title>"
    x, y = f"{frame.px(mark.x):.1f}", f"{frame.py(mark.y):.1f}"
    if mark.shape == "circle":
        return f'<circle class="dot {mark.style}" cx="{x}" cy="{y}" r="5">{label}</circle>'
    points = SHAPES[mark.shape]
    return f'<polygon class="dot {mark.style}" transform="translate({x} {y})" points="{points}">{label}</polygon>'


def glyph(shape: str) -> str:
    """A mark beside its name, for a legend."""
    drawn = '<circle r="4.5"/>' if shape == "circle" else f'<polygon points="{SHAPES[shape]}"/>'
    return f'<svg class="glyph" viewBox="-7 -7 14 14" aria-hidden="true">{drawn}</svg>'


def names(frame: Frame, marks: Sequence[Mark]) -> list[str]:
    """Names beside their marks, the best first; a mark too near to a named one goes without."""
    out: list[str] = []
    named: list[tuple[float, float]] = []
    for mark in reversed(marks):
        x, y, wide = frame.px(mark.x), frame.py(mark.y), LETTER * len(mark.name)
        if any(abs(y - other) < 15 and abs(x - place) < wide for place, other in named):
            continue
        named.append((x, y))
        left = x + 9 + wide <= frame.width
        place = f'x="{x + 9:.1f}"' if left else f'x="{x - 9:.1f}" text-anchor="end"'
        out.append(f'<text class="name" {place} y="{y + 4:.1f}">{escape(mark.name)}</text>')
    return out
