from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline
from PIL import Image

from stepquant import report
from stepquant.errors import EvaluationError
from stepquant.evaluate import evaluate
from stepquant.evaluate.twins import Twins
from stepquant.models.sampling import Sampling
from stepquant.report import Report
from stepquant.report.chart import linear_ticks, log_span, log_ticks
from stepquant.report.images import amplified, decode, grid, write_grid
from stepquant.report.page import Bar, flat, heat, render, speed_bar
from stepquant.report.tables import nearness, table
from tests.report.conftest import png
from tests.report.pages import outside, page_words


def test_results_go_through_json_unchanged(results: dict[str, Any]) -> None:
    first = Report.from_json(results)
    assert Report.from_json(json.loads(json.dumps(first.to_json()))) == first
    for key, value in results["float"].items():
        assert first.to_json()["float"][key] == value


def test_page_shows_every_number_and_needs_nothing_else(results: dict[str, Any], tmp_path: Path) -> None:
    file = report.write(results, tmp_path / "out")
    page = file.read_text()
    words = page_words(page)
    shown = ("3.8 × smaller", "8.0 × faster", "31.2", "12.50", "11.75", "99.00 %", "needs weights", "weight-only", "35.2", "no compiler", "a/b<c>", "settings.p", "73.60 k", "13.9 times")  # fmt: skip
    for text in shown:
        assert text in words, text
    assert outside(page) == []
    assert "prefers-color-scheme: dark" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == Report.from_json(results).to_json()
    assert (tmp_path / "out" / "report.md").read_text().startswith("# a/b<c> · w8a8 · ptq4dm\n")


def test_inputs_that_fit_are_not_shown(results: dict[str, Any]) -> None:
    words = page_words(report.render(Report.from_json(results)))
    assert "wide.conv -1.00 to 2.50 -4.50 to 3.00 1.25 % 0.00 %" in words
    assert "fits.conv" not in words


def test_charts_are_sound_svg_in_the_colours_of_the_page(results: dict[str, Any]) -> None:
    drawn = re.findall(r"<svg.*?</svg>", report.render(Report.from_json(results)), re.DOTALL)
    assert len(drawn) == 2  # wide and narrow
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{3,6}|rgb\(", svg)
        places = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
        assert len(places) == 3 + 3  # the state never strays here, so it has no curve
        assert places[0] > places[1] > places[2]  # a larger error is drawn higher


@pytest.mark.parametrize("part", ["sampling", "quality", "steps", "blocks", "times", "images", "speed", "size", "coverage", "cost", "plan", "environment", "quantized"])  # fmt: skip
def test_parts_that_were_not_measured_are_left_out(results: dict[str, Any], part: str) -> None:
    del results[part]
    page_words(report.render(Report.from_json(results)))
    assert len(report.table(results)) >= 3
    report.card(results)


def test_what_cannot_be_shown_is_named(results: dict[str, Any]) -> None:
    broken = copy.deepcopy(results)
    broken["speed"]["rows"][0]["batch"] = "many"
    with pytest.raises(EvaluationError, match=r"speed\.rows\.0\.batch"):
        Report.from_json(broken)
    with pytest.raises(EvaluationError, match="sped"):
        Report.from_json(results | {"sped": 1})


def test_table_has_the_headlines(results: dict[str, Any]) -> None:
    rows = {row[0]: row[1:] for row in report.table(results)}
    assert rows["size"][:2] == ("40.0 MB", "10.4 MB")
    assert rows["time, batch 8"][:2] == ("80.0 ms", "10.0 ms")
    assert rows["time, batch 8"][3] == "8.0× fp32 eager"
    assert rows["PSNR to float, same seeds"] == ("–", "31.2 ± 1.2 dB", "9.0 dB", "64 images, ddim, 3 calls")
    assert rows["FD-C10 to CIFAR-10 test"] == (
        "11.75",
        "12.50 ± 0.60",
        "11.90",
        "64 images, ddim, 3 calls, network abc123",
    )
    assert rows["MACs in integers"][1] == "99.00 %"
    assert "FID to float, same seeds" not in rows
    lines = report.markdown(results).splitlines()
    assert {line.count("|") for line in lines} == {6}


def test_card_tells_how_to_load_and_what_was_measured(results: dict[str, Any]) -> None:
    text = report.card(results)
    assert "import stepquant" in text
    assert "saves memory and not time" in text  # the plan keeps every input float
    assert "| size | 40.0 MB | 10.4 MB |" in text
    assert "| settings.p | `2.4` |" in text
    results["plan"][0]["port"] = "input"
    assert "multiplies integers" in report.card(results)
    results["float"]["name"] = "owner/model"
    assert 'base_model: "owner/model"' in report.card(results, samples=None)
    assert "![Samples]" not in report.card(results, samples=None)


def test_card_takes_names_for_nothing_but_names(results: dict[str, Any]) -> None:
    name = "a\n- b: |<script>[x](y)`\x85--- \u2028end"
    results["quantized"] |= {
        "name": name,
        "method": name,
        "scheme": name,
        "recipe": {name: name, "``": "`|", "c": "\\|"},
    }
    results["float"] |= {"name": f"owner/{name.partition(':')[0]}", "class": name}
    results["speed"]["rows"][0]["name"] = name
    lines = report.card(results).splitlines()
    end = lines.index("---", 1)
    front = yaml.safe_load("\n".join(lines[1:end]))
    assert front["tags"][:2] == ["stepquant", "quantized"]
    assert len(front["tags"]) == 3
    assert front["tags"][2].startswith("a - b: |<script>")
    assert set(front) == {"library_name", "tags", "base_model"}
    assert front["base_model"] == "owner/a - b"
    bare = re.compile(r"(?<!\\)\|")
    for title, bars in (("| key | value |", 3), ("|  | float", 6)):
        first = next(i for i, line in enumerate(lines) if line.startswith(title))
        rows = list(itertools.takewhile(bool, lines[first:]))
        assert {len(bare.findall(row)) for row in rows} == {bars}
    assert r"\<script\>" in next(line for line in lines if line.startswith("# "))
    assert "| \\`\\` | `` `\\| `` |" in lines
    assert "| c | `\\ \\|` |" in lines


def test_grid_puts_images_row_by_row() -> None:
    images = torch.arange(5).reshape(5, 1, 1, 1).expand(5, 3, 2, 2) / 4
    found = np.asarray(grid(images, columns=3, scale=1))
    assert found.shape == (5, 8, 3)
    assert found[0, [0, 3, 6], 0].tolist() == [0, 64, 128]
    assert found[3, [0, 3, 6], 0].tolist() == [191, 255, 255]
    assert (found[2] == 255).all()  # the gap


def test_tiny_images_are_enlarged_without_blur(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    file = write_grid([images[:1], images[1:]], tmp_path / "deep" / "grid.png", columns=2)
    found = np.asarray(Image.open(file))
    assert found.shape == (96, 17 * 12, 3)
    assert (found[:12, :12] == found[0, 0]).all()
    with pytest.raises(ValueError, match="grid needs images"):
        grid(torch.rand(0, 3, 8, 8))


def test_difference_is_amplified_as_far_as_it_fits() -> None:
    target = torch.rand(2, 3, 8, 8)
    found, gain = amplified(target + 0.03, target)
    assert gain == 16
    torch.testing.assert_close(found, torch.full_like(found, 0.5 + 16 * 0.03))
    assert amplified(target, target)[1] == 64
    torch.testing.assert_close(decode([png(51)])[0, 0, 0, 0], torch.tensor(0.2))


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0, 98, 5) == [0, 20, 40, 60, 80]
    assert log_ticks(0.01, 0.2) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2])
    assert log_span([0.013, 0.34]) == pytest.approx((0.01, 0.5))
    assert log_span([0.0]) == pytest.approx((0.1, 1))


def test_bars_and_colours_follow_their_numbers(results: dict[str, Any]) -> None:
    rows = Report.from_json(results).speed.rows  # type: ignore[union-attr]
    bar = speed_bar(rows[2], longest=95.0)
    assert isinstance(bar, Bar)
    assert (bar.style, bar.length) == ("ours", pytest.approx(100 * 10 / 95))
    assert speed_bar(rows[1], 95.0).text == "unavailable"
    assert [heat(x) for x in (None, 60.0, 45.0, 10.0, 0.0)] == ["0", "0", "0", "100", "100"]
    assert flat({"plan": [1], "a": {"b": 1}, "c": list(range(20))}) == [("a.b", "1"), ("c", "20 entries")]


def test_what_evaluate_returns_can_be_shown(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    found = evaluate(Twins(pipeline, copy.deepcopy(pipeline)), Sampling(2), images=2, probed=1, shown=2)
    words = page_words(report.write(found, tmp_path).read_text())
    assert "What really runs in integers" in words


def test_nearest_times_are_framed_and_coloured_on_a_scale_of_powers(results: dict[str, Any]) -> None:
    found = nearness(Report.from_json(results).times)  # type: ignore[arg-type]
    assert [step for step, _ in found] == [0, 1, 2]
    assert [[nearest for _, _, nearest in cells] for _, cells in found] == [
        [True, False, False],
        [True, False, False],
        [False, False, True],
    ]
    heats = [[float(heat) for _, heat, _ in cells] for _, cells in found]
    assert heats[2][2] == 100
    assert heats[0][2] == 0
    assert 0 < heats[1][1] < heats[1][0] < heats[0][0] < 100
    page = report.render(Report.from_json(results))
    assert page.count("cell nearest") == 3
    assert "33.3 %" in page_words(page)


def test_what_is_known_of_images_one_by_one_is_shown(results: dict[str, Any]) -> None:
    alone = {"n": 64, "better": "higher", "against": "legal images"}
    found = [
        alone | {"name": "recognised", "against": "class asked for", "value": 97.25, "low": 90.0, "high": 99.0, "unit": "%", "reference": 98.5},
        alone | {"name": "truth", "value": 31.25, "low": 31.0, "high": 31.5, "unit": "dB", "reference": 33.0, "change_low": -2.0, "change_high": -1.5, "note": "glasses"},
        alone | {"name": "FD (mine)", "against": "float, same seeds", "value": 3.0, "better": "lower", "extractor": "abc"},
    ]  # fmt: skip
    portion = {"name": "accessory", "area": 3.75, "float": 20.5, "quantized": 41.25, "other": None}
    changed = results | {"quality": found, "portions": [portion]}
    rows = {row[0]: row for row in table(changed)}
    assert rows["recognised to class asked for"][1:3] == ("98.5 %", "97.2 ± 7.2 %")
    assert rows["truth to legal images"][1:3] == ("33.0 dB", "31.2 ± 0.2 dB")
    assert "FD (mine) to float, same seeds" in rows
    assert rows["truth to legal images"][4].startswith("changed by -2.0 to -1.5, 64 ")
    assert rows["recognised to class asked for"][4].startswith("64 ")
    page = render(Report.from_json(changed))
    assert "recognised as the class asked for, float 98.5" in page
    assert "Where images are wrong" in page
    assert re.search(r"33\.0 dB</td><td class=\"n quiet\">-2\.0 to -1\.5</td>", page)
    assert re.search(r"accessory</td>.*3\.8.*41\.2.*20\.5.*–", page)
    assert "a small classifier, whose Frechet distance is not FID" in page
    assert "Where images are wrong" not in render(Report.from_json(results))
