"""The table of engines: processes of their own that take turns, what is kept of them, and the real ones on a small network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.engines import __main__ as engines
from benchmarks.engines import subject
from benchmarks.engines.by import eager, onnx, stepquant
from benchmarks.engines.catalogue import ENGINES, REFERENCE, Engine
from benchmarks.engines.given import Given, inputs_of, relative_error
from benchmarks.engines.store import Store

PRETENDED = "tests.benchmarks.pretended_engine"
THREE = (
    Engine(REFERENCE, "", PRETENDED, {"share": 0.0}),
    Engine("off", "weights", PRETENDED, {"share": 0.02}),
    Engine("absent", "", PRETENDED, {"share": -1.0}),
    Engine("unable", "", PRETENDED, {"share": 0.0}, missing={"unet": "it draws"}),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose calls are recorded."""
    test = tmp_path / "smoke" / "subject" / "test"
    test.mkdir(parents=True)
    x = np.arange(1.0, 7.0, dtype=np.float32)
    np.savez(test / "unet-1.npz", x=x, wanted=x)
    return tmp_path


def test_rows_are_measured_once_and_failures_say_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "ENGINES", THREE)
    options = engines.read_options(["--folder", str(folder), "--size", "smoke", "--cases", "unet"])
    engines.main(options)
    lines = capsys.readouterr().out.splitlines()
    rows = Store(folder / "smoke" / "figures.json").rows()
    off = rows["unet / off"]
    assert off["error"] == pytest.approx(0.02, rel=1e-3)
    assert off["size"] == 1000
    assert 1e6 < off["peak_of_calls"] <= off["peak"]
    assert off["seconds"][1] <= off["seconds"][0] <= off["seconds"][2]
    assert rows[f"unet / {REFERENCE}"]["ratio"] == [1, 1, 1]
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        "| engine", "| ---", f"| {REFERENCE}", "| off", "| absent", "| unable"
    ]  # fmt: skip
    assert "| absent |  | no: ImportError: there is no such engine |" in "\n".join(lines)
    assert "| unable |  | no: it draws |" in "\n".join(lines)

    engines.main(options)  # nothing is left to do but what failed
    assert Store(folder / "smoke" / "figures.json").rows() == rows

    late = Engine("late", "", PRETENDED, {"share": 0.01})
    monkeypatch.setattr(engines, "ENGINES", (*THREE[:2], late))
    options.against = "off"  # memory is short: its own ratio is known
    engines.main(options)
    found = Store(folder / "smoke" / "figures.json").rows()
    assert found.pop("unet / late")["against"] == "off"
    assert found == rows


def test_a_failure_does_not_take_the_place_of_a_figure(tmp_path: Path) -> None:
    store = Store(tmp_path / "figures.json")
    store.put("unet", "off", {"failed": "not there"})
    store.put("unet", "off", {"seconds": [1, 1, 1]})
    store.put("unet", "off", {"failed": "not there"})
    assert store.rows() == {"unet / off": {"seconds": [1, 1, 1]}}


def test_every_engine_has_its_own_name_and_a_file() -> None:
    assert len({one.name for one in ENGINES}) == len(ENGINES)
    root = Path(engines.__file__).parents[2]
    for one in ENGINES:
        assert (root / f"{one.module.replace('.', '/')}.py").is_file()


def small_decoder(folder: Path) -> Given:
    """A decoder, and a call of it for calibration and one for the test."""
    given = Given(folder, folder, "vae", 1)
    coder = subject.autoencoder(0.125)
    subject.save(coder, given.model)
    run = subject.running(subject.Network(coder, "vae"))
    for name in ("calibration", "test"):
        (folder / name).mkdir()
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(len(name))).numpy()
        subject.recorded(run, "vae", folder / name)({"latents": noise})
    return given


def test_the_decoder_in_float_and_in_integers(tmp_path: Path) -> None:
    recorded = dict(np.load(small_decoder(tmp_path).test))
    errors = {}
    for name, engine, options in (("float", eager, {"dtype": "float32"}), ("integers", stepquant, {})):
        one: Any = Given(tmp_path, tmp_path / name, "vae", 1)
        engine.prepare(one, **options)
        errors[name] = relative_error(engine.load(one, **options)(inputs_of(recorded)), recorded["wanted"])
    assert errors["float"] < 1e-5
    assert 1e-4 < errors["integers"] < 0.1
    assert json.loads((tmp_path / "integers" / "vae" / "config.json").read_text())["quantization_config"]


def test_ranges_of_onnx_runtime_are_those_that_its_quantizer_measures(tmp_path: Path) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    given = replace(small_decoder(tmp_path), folder=tmp_path / "onnx")
    given.own.mkdir(parents=True)
    graph, kept = tmp_path / "graph.onnx", tmp_path / "ranges.json"
    onnx.convert(given, graph)
    onnx.measure(given, graph, kept)
    call = iter(given.calls())
    theirs = calibrate.create_calibrator(graph, onnx.KINDS, str(tmp_path / "augmented.onnx"))
    theirs.collect_data(SimpleNamespace(get_next=lambda: next(call, None)))
    wanted, found = theirs.compute_data(), calibrate.load_tensors_data(kept)
    assert set(found.keys()) == set(wanted.keys())
    for name, one in wanted.items():
        np.testing.assert_allclose(found[name].range_value, one.range_value, rtol=1e-3, atol=1e-4)
