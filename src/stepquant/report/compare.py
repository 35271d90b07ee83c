"""Many runs side by side: one table with noise floors, quality against cost, error by step, the same seeds by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from stepquant.report.chart import SHAPES, Line, Mark, glyph, line_chart, scatter
from stepquant.report.columns import (
    Cell,
    Column,
    Entry,
    absent_columns,
    baseline_rows,
    find_columns,
    group,
    mean_of,
    table_cells,
)
from stepquant.report.conditions import conditions, sentences, unavailable
from stepquant.report.heat import heat_maps
from stepquant.report.images import decode, encode, grid
from stepquant.report.page import ARROWS, read, replace_text, template
from stepquant.report.tables import DISTANCES, QUANTIZED, by_batch, markdown_row, plain
from stepquant.schema import Report

FAILED = "failed"
HEADLINES = (
    *("size", "speed", "made in", "peak memory", "recognised", "truth", "broken", "PSNR", "FID"),
    *(*DISTANCES, "noise error"),
)
STYLES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHOWN_FIRST = (*HEADLINES, "SSIM", "LPIPS", "CLIP score")


def compare(
    results: Sequence[Mapping[str, Any]], folder: Path, sensitivity: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write compare.html and compare.md; a result with the key `error` stands for a run that failed.

    sensitivity: rows {path, role, bits, metric, value} of a study of single sites.
    """
    entries, folder = group(results), Path(folder)
    page, words = render(entries, sensitivity), compare_markdown(entries)
    for name, text in (("compare.md", words), ("compare.html", page)):
        replace_text(folder / name, text)
    return folder / "compare.html"


def render(entries: Sequence[Entry], sensitivity: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a comparison."""
    done = [entry for entry in entries if entry.runs]
    columns = find_columns(done)
    main = [column for column in columns if plain(column.title) in SHOWN_FIRST]
    others = [column for column in columns if column not in main] + absent_columns(done)
    return template("compare.html").render(
        style=Markup(read("style.css")),
        first=done[0].runs[0] if done else None,
        tables=[Table.of(entries, done, some) for some in (main, others) if some],
        arrows=ARROWS,
        entries=len(entries),
        runs=sum(len(entry.runs) for entry in entries),
        failures=[entry for entry in entries if entry.errors],
        plots=[(title, Markup(drawn)) for title, drawn in pareto_plots(done)],
        colours=styles([entry.method for entry in done]),
        shapes=[(name, Markup(glyph(shape))) for name, shape in shapes(done).items()],
        curves=[(scheme, names, Markup(drawn)) for scheme, names, drawn in step_curves(done)],
        strips=strips(done),
        heats=heat_maps(sensitivity),
        conditions=conditions(done),
        unavailable=unavailable(done),
    )


@dataclass(frozen=True)
class Table:
    """Some columns of all runs."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, list[Cell]], ...]
    baselines: tuple[tuple[str, list[Cell]], ...]

    @classmethod
    def of(cls, entries: Sequence[Entry], done: Sequence[Entry], columns: Sequence[Column]) -> Table:
        rows = [(entry, table_cells(entry, done, columns)) for entry in entries]
        return cls(tuple(columns), tuple(rows), tuple(baseline_rows(done, columns)))


def shapes(entries: Sequence[Entry]) -> dict[str, str]:
    """A mark for each scheme."""
    kinds = ("circle", *SHAPES)
    schemes = dict.fromkeys(entry.scheme for entry in entries)
    return {scheme: kinds[index % len(kinds)] for index, scheme in enumerate(schemes)}


def styles(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, the same wherever it is drawn; when all are taken, they come once more with gaps."""
    every = (*STYLES, *(f"{style} again" for style in STYLES))
    return {name: every[index % len(every)] for index, name in enumerate(dict.fromkeys(names))}


def pareto_plots(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """The main quality number against size and against time."""
    columns = [
        column for column in find_columns(entries) if plain(column.title) in ("FID", *DISTANCES, "PSNR")
    ]
    if not columns:
        return []
    quality = next((x for x in columns if x.title != "PSNR"), columns[0])
    label = f"{quality.title} to {quality.against}, {'lower' if quality.better == 'lower' else 'higher'} is better"
    colours, marked, out = styles([entry.method for entry in entries]), shapes(entries), []
    costs: tuple[tuple[str, str, Callable[[Report], float | None]], ...] = (
        ("Quality against size", "weights on disk, MB", lambda r: r.size.bytes / 1e6 if r.size else None),
        ("Quality against speed", "time of a call as a share of fp32's, in turns", share_of_time),
    )
    for title, x_label, find in costs:
        cost = Column("", "", "lower", find, str)
        points = [(entry, mean_of(entry, cost), mean_of(entry, quality)) for entry in entries]
        marks = [
            Mark(e.name, colours[e.method], x, y, marked[e.scheme])
            for e, x, y in points
            if x is not None and y is not None
        ]
        if len(marks) > 1:
            out.append((title, scatter(marks, x_label, label, title, lower=quality.better == "lower")))
    return out


def share_of_time(report: Report) -> float | None:
    """In the largest batch; in turns with fp32, so that a busy machine changes both alike."""
    rows = {batch: found[QUANTIZED] for batch, found in by_batch(report).items() if QUANTIZED in found}
    return 1 / ratio if rows and (ratio := rows[max(rows)].ratio) else None


def step_curves(entries: Sequence[Entry]) -> list[tuple[str, list[tuple[str, str]], str]]:
    """A chart for each scheme with a curve for each method: the error of the noise prediction on the same input."""
    colours, out = styles([entry.method for entry in entries]), []
    for scheme in dict.fromkeys(entry.scheme for entry in entries):
        chosen = [entry for entry in entries if entry.scheme == scheme and len(entry.runs[0].steps) > 1]
        lines = [Line(entry.method, colours[entry.method], mean_errors(entry)) for entry in chosen]
        if lines:
            about = f"error by denoising step, {scheme}"
            drawn = line_chart(lines, "denoising step, from noise to image", "relative error", about)
            out.append((scheme, [(line.name, line.style) for line in lines], drawn))
    return out


def mean_errors(entry: Entry) -> list[tuple[float, float]]:
    """Step and error, the mean over seeds."""
    steps = zip(*(run.steps for run in entry.runs))
    return [(some[0].step, fmean(step.relative for step in some)) for some in steps]


def strips(entries: Sequence[Entry], most: int = 10) -> list[tuple[str, list[tuple[str, str]]]]:
    """The same seeds as rows of images by scheme: the float model first, then every method that has these seeds."""
    with_images = [entry for entry in entries if entry.runs[0].images and entry.runs[0].images.seeds]
    if not with_images:
        return []
    first = with_images[0].runs[0].images
    assert first is not None
    count, source = min(most, len(first.seeds)), ("float", strip(first.source[:most]))
    out: dict[str, list[tuple[str, str]]] = {}
    for entry in with_images:
        images = entry.runs[0].images
        if images is not None and images.seeds[:count] == first.seeds[:count]:
            row = (entry.method, strip(images.quantized[:count]))
            out.setdefault(entry.scheme, [source]).append(row)
    return list(out.items())


def strip(images: Sequence[str]) -> str:
    return encode(grid(decode(images), columns=len(images), scale=1))


def summary(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The columns that decide, for a terminal: first row the header, then the float model, then every entry."""
    entries = group(results)
    done = [entry for entry in entries if entry.runs]
    columns = [column for column in find_columns(done) if plain(column.title) in HEADLINES]
    titles = [column.title for column in columns]
    heads = [x.title if titles.count(x.title) == 1 else f"{x.title} to {x.against}" for x in columns]
    out = [("", *(f"{head} {ARROWS[column.better]}" for head, column in zip(heads, columns)))]
    out += [(title, *(with_spread(cell) for cell in cells)) for title, cells in baseline_rows(done, columns)]
    for entry in entries:
        failed = f" ({FAILED}: {entry.errors[0].splitlines()[0]})" if entry.errors else ""
        cells = table_cells(entry, done, columns)
        out.append((entry.name + failed, *(with_spread(cell) for cell in cells)))
    return out


def measured_on(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What every number was measured on, and what could not be measured, as lines of text."""
    return sentences([entry for entry in group(results) if entry.runs])


def with_spread(cell: Cell) -> str:
    return f"{cell.text} {cell.spread}".strip()


def compare_markdown(entries: Sequence[Entry]) -> str:
    """The table as markdown."""
    done = [entry for entry in entries if entry.runs]
    columns = find_columns(done)
    head = ["", *(f"{column.title} ({column.against}) {ARROWS[column.better]}" for column in columns)]
    lines = [markdown_row(head), "|" + "---|" * len(head)]
    for title, cells in baseline_rows(done, columns):
        lines.append(markdown_row([title, *map(with_spread, cells)]))
    for entry in entries:
        cells = table_cells(entry, done, columns)
        shown = [f"{'**' * cell.best}{cell.text}{'**' * cell.best} {cell.spread}".strip() for cell in cells]
        failed = f" ({FAILED}: {'; '.join(entry.errors)})" if entry.errors else ""
        lines.append(markdown_row([entry.name + failed.replace("\n", " "), *shown]))
    lines += ["", *(f"- {sentence}" for sentence in sentences(done))] if done else []
    return "\n".join(lines) + "\n"
