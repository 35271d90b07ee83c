"""stepquant compare and stepquant results, from the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from stepquant.cli import main
from stepquant.cli.compare import split_settings
from stepquant.cli.reporter import Reporter

Fails = Callable[..., str]
QUICK = (
    *("--images", "4", "--steps", "2", "--batch", "2", "--speed", "0", "--executor", "inline"),
    *("--calibration-steps", "4", "--set", "samples=8"),
)


def test_a_grid_with_variants(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "compare",
        str(tiny),
        "--methods",
        "minmax",
        "--variant",
        "minmax:samples=6",
        "--schemes",
        "w8a8",
    ]
    words += [*QUICK, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "found.json")]
    assert main(words) == 0
    said = capfd.readouterr()
    assert "2 cells, 2 made, 0 found, 0 failed" in said.out
    assert "cells (0 of 2 found)" in said.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert [cell["label"] for cell in found["cells"]] == ["minmax", "minmax (samples=6)"]
    assert (tmp_path / "out" / "compare.html").exists()
    assert main(words) == 0
    assert "0 made, 2 found" in capfd.readouterr().out
    pytest.importorskip("duckdb", reason="optional: pip install 'stepquant[compare]'")
    assert (
        main(["results", "--store", str(tmp_path / "out"), "--sql", "select count(*) as n from results"]) == 0
    )
    assert capfd.readouterr().out.split() == ["n", "2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methods", "minmx"), "minmax"),
        (("--methods", "minmax", "--schemes", "w8"), "w8a8"),
        (("--methods", "minmax", "--images", "0"), "--images"),
        (("--methods", "minmax", "--seeds", "0"), "--seeds"),
        (("--methods", "minmax", "--set", "smples=2"), "samples"),
        (("--methods", "minmax", "--executor", "prcesses"), "processes"),
        (("--methods", "minmax", "--address", "host:1"), "--executor ray"),
        (("--methods", "minmax", "--inception", "none.safetensors"), "weights of the FID's InceptionV3"),
        (("--methods", "minmax", "--lpips", "none.safetensors"), "weights of LPIPS"),
        (("--methods", "minmax", "--clip", "none"), "give --prompts FILE"),
        (("--methods", "minmax", "--executor", "inline", "--threads", "2"), "no effect"),
        (("--variant", "minmax"), "NAME:KEY=VALUE"),
        ((), "--methods"),
    ],
)
def test_what_cannot_work_is_one_error(
    tiny: Path, tmp_path: Path, fails: Fails, words: tuple[str, ...], said: str
) -> None:
    assert said in fails("compare", tiny, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "cells").exists()


def test_an_artifact_is_no_float_model(artifact: Path, tmp_path: Path, fails: Fails) -> None:
    assert "quantized itself" in fails("compare", artifact, "--methods", "minmax", "--out", tmp_path / "out")


def test_a_damaged_store(tiny: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "store.json").write_text("{")
    assert "damaged" in fails("compare", tiny, "--methods", "minmax", "--out", tmp_path)
    assert "damaged" in fails("results", "--store", tmp_path)


def test_settings_are_split_outside_of_brackets() -> None:
    assert split_settings("a=1,b=[1,2],c={x:[3,4]}") == ["a=1", "b=[1,2]", "c={x:[3,4]}"]


def test_diff(
    tiny: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: Fails
) -> None:
    other = tmp_path / "other"
    words = ["--method", "minmax", "--scheme", "w4a8", "--steps", "4", "--samples", "8", "--set", "batch=4"]
    assert main(["quantize", str(tiny), *words, "--out", str(other), "--quiet"]) == 0
    capfd.readouterr()
    assert main(["diff", str(artifact), str(other), "--layers", "3", "--json", str(tmp_path / "d.json")]) == 0
    said = capfd.readouterr().out
    assert "int8/channel -> int4/channel" in said
    assert "layers differ" in said
    assert "and " in said
    found = json.loads((tmp_path / "d.json").read_text())
    assert f"{len(found['layers'])} layers differ" in said
    assert "no images of the same seeds" in fails("diff", artifact, other, "--images", tmp_path / "x.png")
    assert "cannot write images" in fails("diff", artifact, other, "--images", tmp_path / "x.txt")
    assert "holds a float model" in fails("diff", artifact, tiny)


def test_full_bars_of_a_long_job_make_room() -> None:
    console = Console(force_terminal=True, file=io.StringIO())
    with Reporter(console, brief=True) as reporter:
        outer = iter(reporter.track(range(2), "cells"))
        next(outer)
        assert list(reporter.track(range(3), "a cell")) == [0, 1, 2]
        abandoned = iter(reporter.track(range(3), "killed"))
        next(abandoned)
        abandoned.close()
        assert reporter.bars is not None
        assert [task.description for task in reporter.bars.tasks if task.visible] == ["cells"]


def test_notes_are_shown_while_an_item_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, file=io.StringIO())
    with Reporter(console) as reporter:
        for _ in reporter.track(range(2), "timing"):
            reporter.note("preparing")
            assert reporter.bars is not None
            assert reporter.bars.tasks[0].fields["words"] == "preparing"

    now = [0.0]
    monkeypatch.setattr("stepquant.cli.reporter.time.monotonic", lambda: now[0])
    log = io.StringIO()
    reporter = Reporter(Console(file=log))
    for item in reporter.track(range(2), "timing"):
        now[0] += 4
        reporter.note(f"preparing {item}")
        now[0] += 4
    assert log.getvalue().splitlines() == ["timing: 1/2, 12 s left (preparing 1)", "timing: done in 16 s"]
