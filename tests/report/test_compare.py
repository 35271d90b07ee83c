from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from stepquant import report
from stepquant.errors import EvaluationError
from stepquant.report.chart import Mark, frontier, scatter
from stepquant.report.columns import (
    baseline_rows,
    find_columns,
    group,
    mean_of,
    merit,
    spread_of,
    table_cells,
)
from stepquant.report.compare import mean_errors, pareto_plots, shapes, strips, styles, summary
from stepquant.report.heat import heat_maps
from tests.report.conftest import png
from tests.report.pages import outside, page_words


@pytest.fixture
def many(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Two methods, one of them with two seeds; one run that failed."""
    found = []
    for method, distance, ratio in (("minmax", 20.0, 30.0), ("ptq4dm", 12.0, 31.0), ("ptq4dm", 14.0, 33.0)):
        run = copy.deepcopy(results)
        run["quantized"]["method"] = method
        run["quality"][1]["value"] = distance
        run["quality"][0]["value"] = ratio
        run["size"]["bytes"] += int(distance)
        found.append(run)
    failed = {"quantized": {"method": "gac", "scheme": "w4a4"}, "error": "NaN at <step> 3"}
    return [*found, failed]


def test_runs_of_one_recipe_are_averaged_over_seeds(many: list[dict[str, Any]]) -> None:
    entries = group(many)
    assert [(entry.name, len(entry.runs)) for entry in entries] == [
        ("minmax w8a8", 1),
        ("ptq4dm w8a8", 2),
        ("gac w4a4", 0),
    ]
    done = entries[:2]
    columns = {column.title: column for column in find_columns(done)}
    assert set(columns) == {
        "size",
        "BOPs",
        "speed",
        "made in",
        "peak memory",
        "PSNR",
        "FD-C10",
        "noise error",
    }
    assert mean_of(entries[0], columns["noise error"]) == pytest.approx(0.02)  # of 0.01, 0.02 and 0.03
    assert mean_of(entries[0], columns["peak memory"]) == 900
    assert mean_of(entries[1], columns["FD-C10"]) == 13
    assert spread_of(entries[1], columns["FD-C10"]) == "± 1.41"  # 12 and 14
    assert spread_of(entries[0], columns["FD-C10"]) == "± 0.55"  # half the interval from 12.0 to 13.1
    assert spread_of(entries[1], columns["size"]) == ""
    best = {c.title: [table_cells(e, done, [c])[0].best for e in done] for c in columns.values()}
    assert best["FD-C10"] == [False, True]
    assert best["PSNR"] == [False, True]


@pytest.mark.parametrize(
    ("better", "good", "bad"), [("higher", 2, 1), ("lower", 1, 2), ("zero", -0.5, 1), ("one", 1.2, 0.5)]
)
def test_merit_knows_the_direction(better: str, good: float, bad: float) -> None:
    assert merit(good, better) > merit(bad, better)


def test_page_has_all_runs_floors_and_failures(many: list[dict[str, Any]], tmp_path: Path) -> None:
    page = report.compare(many, tmp_path).read_text()
    words = page_words(page)
    for text in (
        "ptq4dm",
        "2 seeds",
        "13.00",
        "± 1.41",
        "NaN at <step> 3",
        "is noise",
        "11.90",
        "11.75",
    ):
        assert text in words, text
    assert outside(page) == []
    drawn = re.findall(r"<svg class=.chart.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 2 * (2 + 1)  # size, time and one scheme, wide and narrow
    for svg in drawn:
        ElementTree.fromstring(svg)
    table, notes = (tmp_path / "compare.md").read_text().split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 2 + 2 + 3
    assert notes.splitlines() == [
        "- PSNR: 64 images, ddim, 3 calls",
        "- FD-C10: 64 images, ddim, 3 calls, network abc123",
        "- FID unavailable: needs weights",
    ]
    for text in ("64 images, ddim, 3 calls, network abc123", "unavailable: needs weights"):
        assert text in words
    assert "failed: NaN" in lines[-1]
    assert {line.count("|") for line in lines} == {10}


def test_rows_carry_what_they_sort_by(many: list[dict[str, Any]], tmp_path: Path) -> None:
    page = report.compare(many, tmp_path).read_text()
    rows = [re.findall(r'data-key="([^"]*)"', row) for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    keys: dict[str, list[str]] = {}
    for row in rows:
        keys.setdefault(row[0] if row else "", row[1:])  # of the first table
    assert float(keys["ptq4dm"][-2]) == 13
    assert keys["gac"] == ["w4a4", *[""] * 7]


def test_the_float_row_counts_every_seed_once(many: list[dict[str, Any]]) -> None:
    for run, (seed, floor) in zip(many, ((0, 11.9), (0, 11.9), (1, 12.3))):
        run["sampling"]["seed"], run["quality"][1]["floor"] = seed, floor
    entries = group(many[:3])
    (column,) = [column for column in find_columns(entries) if column.title == "FD-C10"]
    rows = {title: cells[0] for title, cells in baseline_rows(entries, [column])}
    assert rows["float, other seeds"].key == pytest.approx(12.1)
    assert rows["float, other seeds"].spread == "± 0.28"


def test_the_headlines_name_failures(many: list[dict[str, Any]]) -> None:
    header, *rows = summary(many)
    assert header[:2] == ("", "size ↓")
    assert [row[0] for row in rows] == [
        "float, same seeds",
        "float, other seeds",
        "minmax w8a8",
        "ptq4dm w8a8",
        "gac w4a4 (failed: NaN at <step> 3)",
    ]
    assert {len(row) for row in rows} == {len(header)}


def test_a_comparison_of_failures_alone_is_still_a_page(many: list[dict[str, Any]], tmp_path: Path) -> None:
    assert "No run succeeded" in page_words(report.compare(many[-1:], tmp_path).read_text())
    with pytest.raises(EvaluationError, match="nothing to compare"):
        report.compare([], tmp_path)


def test_strips_show_the_same_seeds_only(many: list[dict[str, Any]]) -> None:
    many[1]["images"]["seeds"] = [7, 8]
    ((scheme, rows),) = strips(group(many[:2]))
    assert (scheme, [name for name, _ in rows]) == ("w8a8", ["float", "minmax"])
    many[1]["images"] = {"seeds": [1, 2], "float": [png(1), png(2)], "quantized": [png(3), png(4)]}
    many[1]["quantized"]["scheme"] = "w4a8"
    found = strips(group(many[:2]))
    assert [(scheme, [name for name, _ in rows]) for scheme, rows in found] == [
        ("w8a8", ["float", "minmax"]),
        ("w4a8", ["float", "ptq4dm"]),
    ]


def test_curves_are_means_over_seeds(many: list[dict[str, Any]]) -> None:
    many[2]["steps"][0]["relative"] = 0.03
    entry = group(many[1:3])[0]
    steps, errors = zip(*mean_errors(entry))
    assert steps == (0, 1, 2)
    assert errors == pytest.approx((0.02, 0.02, 0.03))


def test_every_scheme_has_its_mark(many: list[dict[str, Any]]) -> None:
    many[1]["quantized"]["scheme"] = "w4a8"
    entries = [entry for entry in group(many) if entry.runs]
    assert shapes(entries) == {"w8a8": "circle", "w4a8": "square"}
    size, _ = pareto_plots(entries)
    assert size[1].count("<circle") == 2 * 2
    assert size[1].count("<polygon") == 2


def test_heat_maps_put_the_worst_first_whichever_way_is_better() -> None:
    study = [
        {"path": path, "port": "weight", "role": "conv", "bits": bits, "metric": metric, "value": value}
        for metric, values in (("noise", (0.1, 0.001, 0.5, 0.002)), ("psnr", (30.0, 50.0, None, 51.0)))
        for (path, bits), value in zip((("a", 4), ("a", 8), ("b", 4), ("b", 8)), values)
    ]
    noise, ratio = heat_maps(study)
    assert [row.path for row in noise.worst] == ["b weight", "a weight"]
    assert (noise.bits, noise.better) == ((4, 8), "lower")
    assert noise.worst[0].cells == (("0.5", "100"), ("0.002", "11"))
    assert noise.worst[1].cells[1] == ("0.001", "0")
    assert [row.path for row in ratio.worst] == ["a weight", "b weight"]
    assert ratio.worst[0].cells == (("30", "100"), ("50", "5"))
    assert ratio.worst[1].cells[0] == ("–", "0")
    many = [study[0] | {"path": f"layer.{i}"} for i in range(40)]
    assert [len(part) for part in (heat_maps(many)[0].worst, heat_maps(many)[0].others)] == [30, 10]


def test_a_study_is_a_part_of_the_page(many: list[dict[str, Any]], tmp_path: Path) -> None:
    study = [{"path": "mid<block>", "role": "conv", "bits": 4, "metric": "noise", "value": 0.25}]
    page = report.compare(many, tmp_path, study).read_text()
    assert "What single sites cost" in page_words(page)
    assert "mid&lt;block&gt;" in page


def test_frontier_is_what_nobody_beats() -> None:
    marks = [
        Mark(n, "one", x, y) for n, x, y in (("a", 1, 9), ("b", 2, 5), ("c", 3, 7), ("d", 4, 1), ("e", 1, 10))
    ]
    beaten = {m.name for m in marks if any(o.x <= m.x and o.y <= m.y and o is not m for o in marks)}
    assert [mark.name for mark in frontier(marks)] == ["a", "b", "d"]
    assert beaten == {"c", "e"}
    assert [mark.name for mark in frontier(marks, lower=False)] == ["e"]
    drawn = scatter(marks, "x", "y", "about")
    assert drawn.count("<circle") == 2 * len(marks)


def test_no_two_methods_look_the_same() -> None:
    names = [f"method {index}" for index in range(20)]
    found = styles(names)
    assert len(set(found.values())) == 20
    assert found["method 0"] == "one"
    assert found["method 10"] == "one again"
