"""`--fastest`: what is slower in integers stays in bfloat16, timed once for a machine and a shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import stepquant
from stepquant.cli import main
from stepquant.errors import StepquantError
from stepquant.job.fastest import KnownTimes
from stepquant.models.denoiser import Denoiser
from stepquant.runtime.cpu import float_layers
from stepquant.runtime.cpu.float_layers import integer_layers
from stepquant.runtime.cpu.products import why_no_integers

pytestmark = pytest.mark.skipif(why_no_integers(1) is not None, reason=str(why_no_integers(1)))


def run(tmp_path: Path, *words: object) -> Any:
    file = tmp_path / "result.json"
    assert main([*map(str, words), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def race(slow: bool) -> Any:
    return lambda *_: (2e-5, 1e-5) if slow else (1e-5, 2e-5)


def test_inspect_shows_what_stays_float_and_why(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = run(tmp_path, "inspect", artifact)
    assert plain["times"] == []
    monkeypatch.setattr(float_layers, "race", race(slow=True))
    found = run(tmp_path, "inspect", artifact, "--fastest", "--batch", 2)
    assert {row["kernel"] for row in plain["coverage"]} == {"", "attention", "convolution", "linear"}
    assert {row["kernel"] for row in found["coverage"]} == {"", "attention"}
    assert all(layer["stays_float"] for layer in found["times"])
    assert "bfloat16 is faster here: 10 us, not 20" in capfd.readouterr().out
    monkeypatch.setattr(float_layers, "race", lambda *_: pytest.fail("timed again"))
    assert run(tmp_path, "inspect", artifact, "--fastest", "--batch", 2)["times"] == found["times"]


@pytest.mark.parametrize("slow", [True, False])
def test_generate_says_how_many_stay_float(
    slow: bool,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(float_layers, "race", race(slow))
    words = ("generate", artifact, "--images", 3, "--steps", 2, "--out", tmp_path / "x.png")
    run(tmp_path, *words, "--fastest")
    said = capfd.readouterr().err
    layers = len(integer_layers(Denoiser.of(stepquant.load(artifact)).model))
    kept, timed = numbers(said)
    assert 0 < timed <= layers
    assert kept == (timed if slow else 0)
    assert "at batch 3" in said


def numbers(said: str) -> tuple[int, int]:
    """Of the line `K of N layers are faster ...`."""
    line = next(line for line in said.splitlines() if "layers are faster" in line)
    kept, _, timed = line.split()[:3]
    return int(kept), int(timed)


def test_a_float_pipeline_has_nothing_to_choose(tiny: Path) -> None:
    with pytest.raises(StepquantError, match="quantized"):
        stepquant.fastest(stepquant.load(tiny))


def test_times_are_kept_by_machine() -> None:
    known = KnownTimes()
    known.here["layer"] = (1.0, 2.0)
    known.keep()
    assert KnownTimes().here == {"layer": (1.0, 2.0)}
    for broken in ("[", "[1]", f'{{"{known.machine}": 3}}', f'{{"{known.machine}": {{"layer": [1]}}}}'):
        known.file.write_text(broken)
        assert KnownTimes().here == {}
    known.file.write_text(json.dumps({"another machine": {"layer": [3.0, 4.0]}}))
    mine = KnownTimes()
    assert mine.here == {}
    mine.here["layer"] = (1.0, 2.0)
    mine.keep()
    assert set(json.loads(known.file.read_text())) == {"another machine", mine.machine}
