"""Files for ComfyUI on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepquant.cli.app import USER, main
from tests.foreign.test_convert import folder_of, rotated, tiny, written


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model, _ = tiny("flux")
    folder_of(model, tmp_path)
    return written(model, None, rotated)[0].write(tmp_path / "some.safetensors")


def test_inspect_and_convert(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(source), "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    count = len(found["layers"])
    assert f"{count} layers of int8_tensorwise, in the native dialect of ComfyUI" in said
    assert f"{count} of {count} layers would run in integers here" in said
    assert "in groups of 16" in said
    assert "transformer_blocks" not in said
    assert main(["inspect", str(source), "--layers"]) == 0
    assert "transformer_blocks.0.attn.to_q" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["convert", str(source), "--out", str(out), "--config", str(tmp_path / "config")]) == 0
    said = capsys.readouterr().out
    assert f"{count} layers in the integers of the file, rotated in groups of" in said
    assert main(["inspect", str(out), "--layers", "--json", str(tmp_path / "made.json")]) == 0
    said = capsys.readouterr().out
    assert (
        f"converted from 'some': {count} layers of int8_tensorwise, in the native dialect of ComfyUI" in said
    )
    assert "layers with weights on int8/channel, inputs int8/token" in said
    made = json.loads((tmp_path / "made.json").read_text())
    assert len(made["layers"]) == count
    assert made["recipe"]["program"] == "ComfyUI"
    assert main(["convert", str(source), "--out", str(out), "--config", str(tmp_path / "config")]) == USER
    assert "is there already" in capsys.readouterr().err


def test_a_damaged_file_is_one_error(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.write_bytes(source.read_bytes()[:-1])
    assert main(["inspect", str(source)]) == USER
    assert "no intact safetensors file" in capsys.readouterr().err
