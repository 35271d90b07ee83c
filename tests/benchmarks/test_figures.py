"""Figures behind the table of methods are kept: a cell whose figures are there is not measured again and makes the same row."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures
from stepquant.errors import StepquantError
from stepquant.job.pipelines import load
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import Rule

FOLDER = Path(__file__).parents[2] / "benchmarks"
ASKED = [
    "--parts",
    "methods",
    "--methods",
    "minmax,ptq4dm",
    "--schemes",
    "w8a8",
    "--images",
    "4",
    "--steps",
    "2",
    "--set",
    "samples=4",
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as the program has it, whose neighbours are modules of their own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import methods

    yield methods
    for name in ("methods", "method_tables", "figures", "learnt"):
        sys.modules.pop(name, None)


def result(label: str) -> dict[str, Any]:
    """What is measured of a cell, and something that no table reads."""
    number = {"name": "PSNR", "against": "float, same seeds", "value": 30.0, "reference": None, "floor": 10.0}
    return {
        "label": label,
        "float": {"name": "stepquant:characters", "digest": "72cb1a658204", "parameters": 3},
        "quantized": {"scheme": "w8a8", "plan": []},
        "sampling": {"images": 4, "steps": 2, "sampler": "DDIMScheduler", "calls": 2, "seed": 0},
        "environment": {"cpu": "one", "threads": 1, "torch": "2", "host": "away"},
        "size": {"bytes": 10, "float_bytes": 40},
        "making": {"seconds": 1.5, "peak_bytes": 100},
        "quality": [number | {"extractor": "", "images": [1, 2]}],
        "steps": [{"relative": 0.5, "t": 1}, {"relative": 0.25, "t": 0}],
    }


def test_a_cell_whose_figures_are_kept_is_not_measured_again(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "kept.jsonl", tmp_path / "methods.md"
    where = ["--figures", str(file), "--out", str(out), "--store", str(tmp_path / "store"), "--quiet"]
    options = script.read_options([*ASKED, *where])
    kept_one, other = script.plan_tables(options)["methods"]
    asked: list[Any] = []
    monkeypatch.setattr(script, "read_options", lambda typed=None: options if typed is None else plain)
    monkeypatch.setattr(script, "compare", lambda cells, *_, **__: asked.extend(cells) or Done())
    plain = type(options)(**vars(options))

    key = figures.key(Denoiser.of(load(script.MODEL)), kept_one)
    figures.write(file, {key: figures.compact(result("minmax"))})
    before = file.read_text()
    assert "host" not in before
    assert script.main() == 0
    assert asked == [other]
    assert "| w8a8 | minmax | 1 | 30.00 | 0.3750 | 0.0 | 2 | 0 |" in out.read_text()
    assert file.read_text() == before
    options.again = True
    assert script.main() == 0
    assert asked == [other, kept_one, other]


def test_a_key_follows_what_the_scheme_does_to_this_network(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = script.plan_tables(script.read_options(ASKED))["methods"][0]
    denoiser, plan = Denoiser.of(load(script.MODEL)), cell.recipe.build_plan()
    former = figures.key(denoiser, cell)
    keys = []
    for path in ("nothing.here", "conv_in"):
        rule = Rule(None, "another rule", path=path, optional=True)
        other = replace(plan, rules=(rule, *plan.rules))
        monkeypatch.setattr(type(cell.recipe), "build_plan", lambda _, other=other: other)
        keys.append(figures.key(denoiser, cell))
    assert keys[0] == former
    assert keys[1] != former


class Done:
    made, found, failed = 1, 0, 0


def test_figures_of_another_model_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "figures.jsonl"
    row = {"cell": "0f", "float": {"digest": "a"}, "label": "minmax"}
    file.write_text(json.dumps(row) + "\n")
    assert list(figures.read(file, "a")) == ["0f"]
    assert figures.read(file, "b") == {}


def test_a_damaged_file_is_one_error_that_says_which(tmp_path: Path) -> None:
    file = tmp_path / "figures.jsonl"
    file.write_text('{"cell": "0f", "float"')
    with pytest.raises(StepquantError, match="kept figures cannot be read"):
        figures.read(file, "a")
