"""Files for ComfyUI on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stepquant.cli.app import USER, main
from tests.foreign.test_convert import folder_of, rotated, tiny, written
from tests.foreign.writer import fast, file_of, fp8, int8, w4a4, w4a8


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
    assert main(["inspect", str(source.rename(source.with_suffix(".bin")))]) == USER
    assert "only safetensors and GGUF files are read" in capsys.readouterr().err


SHOWN = {  # what stands in the file, whether in its metadata, and what is said of it
    "native": (lambda w: int8(w, 16), False, "int8_tensorwise, in the native dialect", "1 in groups of 16", 1),
    "fast": (lambda w: fast(int8(w, 64)), False, "int8_tensorwise, in the INT8-Fast dialect", "1 in groups of 64", 1),
    "metadata": (int8, True, "int8_tensorwise, in the metadata dialect", "none", 1),
    "four bits": (w4a4, False, "convrot_w4a4, in the native dialect", "1 in groups of 16", 1),
    "a table": (w4a8, False, "asym_w4a8_int8, in the native dialect", "1 in groups of 16", 1),
    "fp8": (fp8, False, "float8_e4m3fn, in the native dialect", "none", 0),
}  # fmt: skip


@pytest.mark.parametrize("what", SHOWN)
def test_inspect_says_which_int8_it_is(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, table, words, rotated_in, integers = SHOWN[what]
    torch.manual_seed(0)
    file = file_of({"block.bias": torch.zeros(8)}, {"block.a": kind(torch.randn(8, 64))}, table)
    assert main(["inspect", str(file.write(tmp_path / "some.safetensors")), "--layers"]) == 0
    said = capsys.readouterr().out
    assert f"1 layers of {words} of ComfyUI" in said
    assert f"rotated: {rotated_in}; 1 tensors in float" in said
    assert f"{integers} of 1 layers would run in integers here" in said
    assert "block.a" in said
