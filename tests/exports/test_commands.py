"""Exports on the command line: what is said before and after, and everything that is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from stepquant.cli.app import USER, main
from stepquant.hub.exports import onnx
from tests.crafted import agree, read, save, write
from tests.exports.conftest import Make


def test_what_is_left_behind_is_said_before_and_after(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, found = tmp_path / "new" / "a.safetensors", tmp_path / "found.json"
    words = ["export", str(calibrated.parent), "--to", "comfyui", "--out", str(out), "--json", str(found)]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "left behind: the ranges of the inputs of" in told.err
    assert "quantized layers keep their integers in a file for comfyui" in told.err
    assert "left behind: the ranges of the inputs of" in told.out
    assert "ComfyUI has no quantized convolution" in told.out
    assert "mid_block.attentions.0.to_q" not in told.out
    result = json.loads(found.read_text())
    assert result["bytes"] == out.stat().st_size
    assert result["layers"]["conv_out"]["becomes"] == "float"
    assert [one.name for one in out.parent.iterdir()] == ["a.safetensors"]
    assert main(words) == USER
    assert "is there already" in capsys.readouterr().err


REFUSED = {
    "unknown format": (["--to", "comfy"], "unknown format 'comfy'"),
    "another ending": (["--to", "gguf"], "does not end in .gguf"),
    "names of a graph": (["--to", "onnx", "--names", "original"], "names are not chosen"),
    "other names": (["--to", "comfyui", "--names", "mine"], "unknown kind of names 'mine'"),
    "no pipeline": (["--to", "comfyui", "--component", "unet"], "is no pipeline"),
}


def test_what_cannot_be_is_one_error(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case, (words, said) in REFUSED.items():
        out = tmp_path / ("a.onnx" if "onnx" in words else "a.safetensors")
        assert main(["export", str(calibrated), "--out", str(out), *words]) == USER, case
        assert said in capsys.readouterr().err, case
        assert not out.exists(), case


def test_only_packed_integers_that_nobody_altered(
    rounded: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, folder = rounded("wan")
    out = ["--to", "gguf", "--out", str(tmp_path / "a.gguf")]
    assert main(["export", str(tmp_path / "float"), *out]) == USER
    assert "holds no packed integers" in capsys.readouterr().err
    assert main(["export", str(tmp_path), *out]) == USER
    assert "holds no network" in capsys.readouterr().err
    config, tensors = read(folder)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][0] *= 2
    write(folder, config, tensors)
    assert main(["export", str(folder), *out]) == USER
    assert f"tensor '{name}' was altered" in capsys.readouterr().err
    tensors[name][0] = -1
    agree(config, tensors)
    write(folder, config, tensors)
    assert main(["export", str(folder), *out]) == USER
    assert "holds values that cannot be" in capsys.readouterr().err


def test_a_network_whose_time_layers_are_a_table_is_refused(source: object, tmp_path: Path) -> None:
    from stepquant.errors import StepquantError
    from stepquant.job.export import export

    folder = save(source, tmp_path / "pipeline", steps=True)  # type: ignore[arg-type]
    for to, file in (("comfyui", "a.safetensors"), ("gguf", "a.gguf"), ("sdnq", "a")):
        with pytest.raises(StepquantError, match="a table holds what the time embedding becomes"):
            export(folder, tmp_path / file, to=to)


def test_graphs_need_a_pipeline_and_their_packages(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["export", str(calibrated), "--to", "onnx", "--out", str(tmp_path / "a.onnx")]
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    assert main(words) == USER
    assert "pip install 'stepquant[export]'" in capsys.readouterr().err
    monkeypatch.setattr(onnx, "find_spec", lambda name: find_spec("torch"))
    assert main(words) == USER
    assert "a graph is traced in a call of its pipeline" in capsys.readouterr().err


def test_a_list_of_samples_is_no_graph(rounded: Make) -> None:
    from stepquant.errors import StepquantError
    from stepquant.hub.exports.at_rest import at_rest

    _, given, folder = rounded("z_image")
    with pytest.raises(StepquantError, match="it takes a list of samples"):
        onnx.outlook(at_rest(folder), given)
