"""The page: results as one self-contained HTML file, light or dark as the reader's system is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stepquant.calib.cache import atomically
from stepquant.report import tables
from stepquant.report.chart import Line, line_chart
from stepquant.report.images import amplified, decode, encode, grid
from stepquant.report.tables import QUANTIZED, by_batch, integer_share, markdown
from stepquant.schema import Coverage, Decision, Input, Number, Report, Timing

# Blocks at or below the first number of decibels are drawn in full colour, at or above the second in none.
NOISY, CLEAN = 10.0, 45.0
# A smaller share of clipped values than this is not shown.
NOTEWORTHY = 0.0005
# Where a number should go.
ARROWS = {"higher": "↑", "lower": "↓", "zero": "→ 0", "one": "→ 1"}


@dataclass(frozen=True)
class Figure:
    """A headline number with its unit and what it is."""

    value: str
    unit: str
    label: str


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: its length and whisker in percent of the width, and the words at its end."""

    name: str
    style: str
    length: float
    text: str
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Share:
    """Sites of one plan that got the same grid for the same reason."""

    grid: str
    ports: str
    roles: str
    count: int
    reason: str


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html, report.md and results.json into a folder; the path of the page."""
    report, folder = Report.from_json(results), Path(folder)
    page, words = render(report), f"# {report.title}\n\n{markdown(report)}"
    kept = json.dumps(report.to_json(), indent=1, allow_nan=False)
    for name, text in (("results.json", kept), ("report.md", words), ("report.html", page)):
        replace_text(folder / name, text)
    return folder / "report.html"


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all: a reader may have the former one open."""
    atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def render(report: Report) -> str:
    """The page of a report."""
    return template("report.html").render(
        report=report,
        style=Markup(read("style.css")),
        figures=figures(report),
        panels=panels(report),
        quality=by_target(report.quality),
        curves=Markup(curves(report)),
        heat=heat,
        nearness=tables.nearness,
        clipped=most_clipped(report),
        speeds=speed_bars(report),
        sizes=size_bars(report),
        coverage=layers_by_work(report),
        share=integer_share(report),
        reasons=float_reasons(report),
        shares=plan_shares(report.plan),
        recipe=flat(report.quantized.recipe),
        networks=tables.networks(report),
        own=tables.is_own,
        cells=quality_cells,
        zipped=zip,
        arrows=ARROWS,
        width=lambda bits: "float" if bits == 32 else f"{bits} bit",
        amount_of=tables.with_prefix,
        megabytes=tables.megabytes,
    )


def template(name: str, *, escape: bool = True) -> Any:
    environment = Environment(
        autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(read(name))


def read(name: str) -> str:
    return (files("stepquant.report") / name).read_text(encoding="utf-8")


def figures(report: Report) -> list[Figure]:
    """What a reader should know who reads nothing else."""
    out = []
    if report.size:
        out.append(Figure(f"{1 / report.size.ratio:.1f}", "× smaller", "weights on disk, against fp32"))
    fastest = best_speed(report)
    if fastest:
        out.append(
            Figure(
                f"{fastest.ratio:.1f}",
                "× faster",
                f"than {report.speed.reference}, batch {fastest.batch}" if report.speed else "",
            )
        )
    ratio = report.number("PSNR")
    if ratio:
        out.append(Figure(f"{ratio.value:.1f}", "dB", "PSNR to float, same seeds"))
    out += [Figure(*words) for words in tables.alone(report)]
    distance = tables.distance_of(report)
    if distance:
        beside = f", float {distance.reference:.2f}" if distance.reference is not None else ""
        out.append(Figure(f"{distance.value:.2f}", distance.name, f"to {distance.against}{beside}"))
    if report.coverage:
        out.append(Figure(f"{100 * integer_share(report):.1f}", "%", "of all MACs in integers"))
    return out


def best_speed(report: Report) -> Timing | None:
    ours = [rows[QUANTIZED] for rows in by_batch(report).values() if QUANTIZED in rows]
    return max((row for row in ours if row.ratio), key=lambda row: row.ratio or 0, default=None)


def panels(report: Report) -> list[tuple[str, str, str]]:
    """Title, note and PNG of the float, integer and difference grids."""
    if report.images is None or not report.images.source:
        return []
    source, quantized = decode(report.images.source), decode(report.images.quantized)
    difference, gain = amplified(quantized, source)
    shown = f"{len(source)} seeds"
    return [
        ("Float", shown, encode(grid(source, scale=1))),
        ("Integer", "the same seeds", encode(grid(quantized, scale=1))),
        ("Difference", f"{gain}× around grey", encode(grid(difference, scale=1))),
    ]


def curves(report: Report) -> str:
    """Errors of the noise prediction and of the state by denoising step."""
    lines = [
        Line("same input", "one", [(s.step, s.relative) for s in report.steps]),
        Line(
            "own trajectory",
            "two",
            [(s.step, s.own_relative) for s in report.steps if s.own_relative is not None],
        ),
        Line("state x", "three", [(s.step, s.state_relative) for s in report.steps if s.state_relative]),
    ]
    lines = [line for line in lines if len(line.points) > 1 and any(y > 0 for _, y in line.points)]
    if not lines:
        return ""
    return line_chart(
        lines, "denoising step, from noise to image", "relative error", "relative error by denoising step"
    )


def heat(value: float | None) -> str:
    """How strongly a cell is coloured, in percent: noise is colour."""
    if value is None:
        return "0"
    return f"{100 * min(max((CLEAN - value) / (CLEAN - NOISY), 0), 1):.0f}"


def most_clipped(report: Report, most: int = 12) -> list[Input]:
    """The layers whose integers cannot hold what they receive, the worst first."""
    worst = {row.path: max((x for x in row.clipped if x is not None), default=0.0) for row in report.inputs}
    rows = [row for row in report.inputs if worst[row.path] > NOTEWORTHY]
    return sorted(rows, key=lambda row: -worst[row.path])[:most]


def speed_bars(report: Report) -> list[tuple[int, list[Bar]]]:
    """Bars of each batch size, on one scale a batch size: a batch of 32 would dwarf the others."""
    out = []
    for batch, rows in by_batch(report).items():
        longest = max((row.high or row.milliseconds or 0 for row in rows.values()), default=0) or 1
        out.append((batch, [speed_bar(row, longest) for row in rows.values()]))
    return out


def speed_bar(row: Timing, longest: float) -> Bar:
    style = "ours" if row.name == QUANTIZED else "theirs"
    if row.milliseconds is None:
        return Bar(row.name, style, 0, "unavailable", note="see below")
    text = tables.milliseconds(row.milliseconds) + (
        f" · {row.ratio:.1f}×" if row.ratio and row.ratio != 1 else ""
    )
    ends = [None if end is None else 100 * end / longest for end in (row.low, row.high)]
    return Bar(row.name, style, 100 * row.milliseconds / longest, text, ends[0], ends[1], row.layout)


def size_bars(report: Report) -> list[Bar]:
    if report.size is None:
        return []
    size = report.size
    text = f"{tables.megabytes(size.bytes)} · {size.ratio:.3f}"
    return [
        Bar("fp32", "theirs", 100, tables.megabytes(size.float_bytes)),
        Bar(QUANTIZED, "ours", 100 * size.ratio, text),
    ]


def layers_by_work(report: Report) -> list[tuple[Coverage, float]]:
    """Layers and their share of all MACs, the largest first."""
    total = sum(row.macs for row in report.coverage) or 1
    return [(row, row.macs / total) for row in sorted(report.coverage, key=lambda row: -row.macs)]


def float_reasons(report: Report) -> list[tuple[str, int, float]]:
    """Why layers did not multiply integers, how many, and their share of all MACs."""
    total = sum(row.macs for row in report.coverage) or 1
    found: dict[str, list[int]] = {}
    for row in report.coverage:
        if not row.integer:
            found.setdefault(row.reason or "no reason given", []).append(row.macs)
    rows = [(reason, len(macs), sum(macs) / total) for reason, macs in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def plan_shares(plan: Sequence[Decision]) -> list[Share]:
    """The plan by what it decided, in the order of its rules."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for decision in plan:
        groups.setdefault((decision.grid or "float", decision.reason), []).append(decision)
    return [
        Share(grid, listed(x.port for x in group), listed(x.role for x in group), len(group), reason)
        for (grid, reason), group in groups.items()
    ]


def listed(names: Any) -> str:
    return ", ".join(dict.fromkeys(names))


def flat(recipe: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys as dotted names, in their order."""
    out: list[tuple[str, str]] = []
    for key, value in recipe.items():
        if not prefix and key == "plan":  # has a table of its own
            continue
        if isinstance(value, Mapping) and value:
            out += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and len(value) > 8:
            out.append((f"{prefix}{key}", f"{len(value)} entries"))
        else:
            out.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return out


def by_target(numbers: Sequence[Number]) -> list[tuple[str, list[Number]]]:
    """Numbers that have a value, by what they are against, in the order of their first."""
    groups: dict[str, list[Number]] = {}
    for number in numbers:
        if number.value is not None:
            groups.setdefault(number.against, []).append(number)
    return list(groups.items())


def quality_cells(number: Number) -> tuple[str, str, str, str, str]:
    """Integer, float, floor, interval and the change's interval of one row."""
    interval = ""
    if number.low is not None and number.high is not None:
        places = tables.decimals(number)
        interval = f"{number.low:.{places}f} to {number.high:.{places}f}"
    return (
        tables.amount(number.value, number),
        tables.amount(number.reference, number),
        tables.amount(number.floor, number),
        interval,
        tables.change(number),
    )
