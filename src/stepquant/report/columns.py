"""The numbers of many runs in columns: means over seeds, spreads, the best, and the noise floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepquant.errors import EvaluationError
from stepquant.report import tables
from stepquant.report.page import best_speed
from stepquant.schema import Number, Report

# In this order, then all others.
METRICS = (
    "recognised",
    "truth",
    "broken",
    "PSNR",
    "SSIM",
    "LPIPS",
    "FID",
    *tables.DISTANCES,
    "CLIP score",
    "sFID",
    "KID",
    *(name.replace("FD", "KD") for name in tables.DISTANCES),
    "IS",
    "precision",
    "recall",
    "density",
    "coverage",
    "colour shift",
    "over-exposure",
    "structure change",
    "detail",
)


@dataclass(frozen=True)
class Entry:
    """Runs of one method and scheme that differ in their seed, and what went wrong in those that failed."""

    method: str
    scheme: str
    runs: tuple[Report, ...]
    errors: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.method} {self.scheme}".strip()


@dataclass(frozen=True)
class Column:
    """A number of every run: how to find it, and where it should go."""

    title: str
    against: str
    better: str
    find: Callable[[Report], float | None]
    show: Callable[[float], str]
    number: Callable[[Report], Number | None] = lambda _: None


@dataclass(frozen=True)
class Cell:
    """What the table shows, and what it sorts by."""

    text: str
    spread: str = ""
    key: float | None = None
    best: bool = False


def group(results: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """Entries in the order in which they first occur."""
    if not results:
        raise EvaluationError("nothing to compare", fix="evaluate at least one artifact first")
    runs: dict[tuple[str, str], list[Report]] = {}
    errors: dict[tuple[str, str], list[str]] = {}
    for result in results:
        quantized = result.get("quantized") or {}
        key = (str(quantized.get("method", "")), str(quantized.get("scheme", "")))
        runs.setdefault(key, [])
        errors.setdefault(key, [])
        if result.get("error"):
            errors[key].append(str(result["error"]))
        else:
            runs[key].append(Report.from_json(result))
    return [Entry(*key, tuple(runs[key]), tuple(dict.fromkeys(errors[key]))) for key in runs]


def find_columns(entries: Sequence[Entry]) -> list[Column]:
    """Cost first, then every metric that some run has."""
    reports = [run for entry in entries for run in entry.runs]
    out = [
        Column("size", "of fp32", "lower", lambda r: r.size.ratio if r.size else None, "{:.3f}".format),
        Column(
            "BOPs",
            "one call, an image",
            "lower",
            lambda r: r.cost.bops if r.cost else None,
            tables.with_prefix,
        ),
        Column("speed", "fp32 = 1", "higher", speed_ratio, "{:.1f}×".format),
        Column(
            "made in", "seconds", "lower", lambda r: r.making.seconds if r.making else None, "{:.0f}".format
        ),
        Column("peak memory", "making it, MB", "lower", peak_megabytes, "{:.0f}".format),
    ]
    out = [column for column in out if any(column.find(report) is not None for report in reports)]
    kinds = {(x.name, x.against): x for report in reports for x in report.quality if x.value is not None}
    return out + [metric_column(kinds[key]) for key in sorted(kinds, key=place)] + error_columns(reports)


def place(kind: tuple[str, str]) -> int:
    """Of a metric among the columns, whatever it is against and whoever's features it looks at."""
    name = tables.plain(kind[0])
    return METRICS.index(name) if name in METRICS else len(METRICS)


def absent_columns(entries: Sequence[Entry]) -> list[Column]:
    """Metrics that no run has, each with what it takes to have it."""
    numbers = [number for entry in entries for run in entry.runs for number in run.quality]
    measured = {(number.name, number.against) for number in numbers if number.value is not None}
    kinds = {
        (number.name, number.against): number
        for number in numbers
        if number.unavailable and (number.name, number.against) not in measured
    }
    return [absent_column(kinds[key]) for key in sorted(kinds, key=place)]


def absent_column(number: Number) -> Column:
    return Column(number.name, f"unavailable: {number.unavailable}", number.better, lambda _: None, str)


def peak_megabytes(report: Report) -> float | None:
    return report.making.peak_bytes / 1e6 if report.making and report.making.peak_bytes else None


def error_columns(reports: Sequence[Report]) -> list[Column]:
    """The error of the noise prediction on the float trajectory, as its mean over the steps."""
    column = Column("noise error", "mean over steps", "lower", mean_error, "{:.4f}".format)
    return [column] if any(report.steps for report in reports) else []


def mean_error(report: Report) -> float | None:
    return statistics.fmean(step.relative for step in report.steps) if report.steps else None


def speed_ratio(report: Report) -> float | None:
    fastest = best_speed(report)
    return fastest.ratio if fastest else None


def metric_column(example: Number) -> Column:
    def number(report: Report) -> Number | None:
        same = (x for x in report.quality if (x.name, x.against) == (example.name, example.against))
        return next((x for x in same if x.value is not None), None)

    def find(report: Report) -> float | None:
        found = number(report)
        return found.value if found else None

    places = tables.decimals(example)
    return Column(example.name, example.against, example.better, find, f"{{:.{places}f}}".format, number)


def table_cells(entry: Entry, entries: Sequence[Entry], columns: Sequence[Column]) -> list[Cell]:
    """A cell for each column; the best mean of a scheme in a column is marked."""
    rivals = [other for other in entries if other.scheme == entry.scheme]
    out = []
    for column in columns:
        value = mean_of(entry, column)
        if value is None:
            out.append(Cell(tables.NONE))
            continue
        others = [other for other in (mean_of(x, column) for x in rivals) if other is not None]
        best = merit(value, column.better) >= max(merit(other, column.better) for other in others)
        out.append(Cell(column.show(value), spread_of(entry, column), value, best and len(others) > 1))
    return out


def merit(value: float, better: str) -> float:
    """Larger is better, whatever the direction."""
    return {"higher": value, "lower": -value, "zero": -abs(value), "one": -abs(value - 1)}[better]


def mean_of(entry: Entry, column: Column) -> float | None:
    values = [value for value in map(column.find, entry.runs) if value is not None]
    return statistics.fmean(values) if values else None


def spread_of(entry: Entry, column: Column) -> str:
    """Standard deviation over seeds; half the interval of a single run."""
    values = [value for value in map(column.find, entry.runs) if value is not None]
    if len(values) > 1:
        spread = statistics.stdev(values)
        return f"± {column.show(spread)}" if spread > 0 else ""
    number = column.number(entry.runs[0])
    if number is None or number.low is None or number.high is None:
        return ""
    return f"± {column.show((number.high - number.low) / 2)}"


def baseline_rows(entries: Sequence[Entry], columns: Sequence[Column]) -> list[tuple[str, list[Cell]]]:
    """The float model on the same seeds, and on others: what no method can be told from."""
    rows = []
    for title, field in (
        ("float, same seeds", "reference"),
        ("float, other seeds", "floor"),
    ):
        cells = [baseline_cell(entries, column, field) for column in columns]
        if any(cell.key is not None for cell in cells):
            rows.append((title, cells))
    return rows


def baseline_cell(entries: Sequence[Entry], column: Column, field: str) -> Cell:
    """The mean over seeds, each counted once however many runs share its float images, and their spread."""
    by_seed: dict[int, list[float]] = {}
    for report in (run for entry in entries for run in entry.runs):
        number = column.number(report)
        value = getattr(number, field) if number is not None else None
        if value is not None:
            by_seed.setdefault(report.sampling.seed if report.sampling else 0, []).append(value)
    values = [statistics.fmean(found) for found in by_seed.values()]
    if not values:
        return Cell(tables.NONE)
    spread = f"± {column.show(statistics.stdev(values))}" if len(values) > 1 else ""
    return Cell(column.show(statistics.fmean(values)), spread, statistics.fmean(values))
