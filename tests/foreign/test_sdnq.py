"""Folders of SDNQ become folders of the same integers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepquant.cli.app import main
from stepquant.errors import ArtifactError, ModelError
from stepquant.hub.foreign.read import read
from stepquant.job.foreign import convert, inspect_file
from stepquant.runtime.layers.layer import IntegerLayer
from tests.foreign.sdnq_writer import Folder, Packed, folder_of, packed, with_branch
from tests.foreign.test_convert import predicted, tiny
from tests.runtime.synthetic import relative

# How layers are packed, what the folder says of it, the grids that they get, and how near they come.
KINDS: dict[str, tuple[Callable[[Tensor], Packed], dict[str, Any], set[str], float]] = {
    "int8": (partial(packed, "int8"), {"weights_dtype": "int8"}, {"int8/channel"}, 0.02),
    "int8 for products": (
        partial(packed, "int8", transposed=True),
        {"weights_dtype": "int8", "use_quantized_matmul": True},
        {"int8/channel"},
        0.03,
    ),
    "int8 in groups": (partial(packed, "int8", group=16), {"weights_dtype": "int8"}, {"int8/group16"}, 0.02),
    "uint8": (partial(packed, "uint8"), {"weights_dtype": "uint8"}, {"uint8/channel/sym"}, 0.02),
    "uint4": (partial(packed, "uint4", group=16), {"weights_dtype": "uint4"}, {"uint4/group16/sym"}, 0.3),
    "int4": (partial(packed, "int4", group=8), {"weights_dtype": "int4"}, {"int4/group8"}, 0.3),
    "rotated": (
        partial(packed, "uint4", group=8, rotation=16),
        {"weights_dtype": "uint4", "use_hadamard": True, "hadamard_group_size": 16},
        {"uint4/group8/sym"},
        0.3,
    ),
    "rotated for products": (
        partial(packed, "int8", rotation=16, transposed=True),
        {
            "weights_dtype": "int8",
            "use_hadamard": True,
            "hadamard_group_size": 16,
            "use_quantized_matmul": True,
        },
        {"int8/channel"},
        0.03,
    ),
    "with a branch": (
        partial(with_branch, "uint4", rank=4),
        {"weights_dtype": "uint4", "use_svd": True, "svd_rank": 4},
        {"uint4/channel/sym"},
        0.3,
    ),
    "with a branch, for products": (
        partial(with_branch, "int8", rank=4, transposed=True),
        {"weights_dtype": "int8", "use_svd": True, "use_quantized_matmul": True},
        {"int8/channel"},
        0.03,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_integers_are_kept(name: str, tmp_path: Path) -> None:
    model, given = tiny("flux")
    kind, config, grids, near = KINDS[name]
    made = folder_of(model, kind, **config)
    source = made.write(tmp_path / "source", shards=2 if name == "int8" else 1)
    told = convert(source, tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    layers = [one for one in loaded.modules() if isinstance(one, IntegerLayer)]
    assert len(layers) == told.layers > 20
    assert {str(one.spec.weight) for one in layers} == grids
    assert {one.integer for one in layers} == {"products" in name}
    assert {one.spec.rotation for one in layers} == {16 if "rotated" in name else 0}
    assert (told.recipe["program"], told.recipe["dialect"]) == ("SDNQ", "0.2.8")
    out = predicted(loaded, given)
    assert relative(out, predicted(model, given)) < near
    back = loaded.dequantize().state_dict()
    exact = "rotated" not in name and "branch" not in name
    for path, value in made.floats.items():
        torch.testing.assert_close(back[path], value, rtol=0, atol=0 if exact else 1e-6, msg=path)


def test_layers_of_several_types_and_convolutions(tmp_path: Path) -> None:
    """Convolutions have a scale for each tap, which is none of our grids: they become float."""
    model, given = tiny("text_to_image")
    made = folder_of(
        model,
        partial(packed, "uint4", group=8),
        weights_dtype="uint4",
        modules_dtype_dict={"int8": ["conv1"]},
    )
    path = "mid_block.resnets.0.conv1"
    weight = made.tensors.pop(f"{path}.weight")
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    made.tensors |= {f"{path}.weight": codes, f"{path}.scale": scale}
    made.floats[f"{path}.weight"] = codes.float() * scale
    path = "mid_block.resnets.0.conv2"
    weight = made.tensors.pop(f"{path}.weight")
    groups = weight.reshape(len(weight), 2, -1, 3, 3)
    zero = groups.amin(2, keepdim=True)
    scale = (groups.amax(2, keepdim=True) - zero) / 15
    codes = ((groups - zero) / scale).round().clamp(0, 15).to(torch.uint8).reshape(-1, 2)
    made.tensors |= {
        f"{path}.weight": codes[:, 0] | codes[:, 1] << 4,
        f"{path}.scale": scale,
        f"{path}.zero_point": zero,
    }
    made.floats[f"{path}.weight"] = (codes.reshape(groups.shape).float() * scale + zero).reshape(weight.shape)
    plain = "down_blocks.0.resnets.0.conv1"
    weight = made.tensors.pop(f"{plain}.weight")
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    made.tensors |= {f"{plain}.weight": codes, f"{plain}.scale": scale.expand(-1, 1, 3, 3).contiguous()}
    made.floats[f"{plain}.weight"] = codes.float() * scale
    source = made.write(tmp_path / "source")
    told = convert(source, tmp_path / "out")
    assert set(told.recipe["floats"]) == {"mid_block.resnets.0.conv1", path}
    assert set(told.recipe["formats"]) == {"int8", "uint4"}
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert str(loaded.get_submodule(plain).spec.weight) == "int8/channel"
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.3
    back = loaded.dequantize().state_dict()
    assert all(torch.equal(back[name], value) for name, value in made.floats.items())


@pytest.fixture(scope="module")
def some() -> Folder:
    model, _ = tiny("flux")
    return folder_of(model, partial(packed, "uint4", group=16), weights_dtype="uint4")


def test_inspect_says_what_would_run(
    some: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = some.write(tmp_path / "source")
    assert main(["inspect", str(source), "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    count = len(found["layers"])
    assert f"{count} layers of uint4, by SDNQ 0.2.8" in said
    assert f"{count} of {count} layers would keep their integers" in said
    assert f"0 of {count} layers would run in integers here" in said
    assert {row["scales"] for row in found["layers"]} == {"16 inputs"}
    assert main(["convert", str(source), "--out", str(tmp_path / "out")]) == 0
    assert f"{count} layers in the integers of the file" in capsys.readouterr().out


Change = Callable[[Folder], object]
A = "transformer_blocks.0.attn.to_q"


def becomes(leaf: str, value: Tensor) -> Change:
    return lambda folder: folder.tensors.update({f"{A}.{leaf}": value})


def says(**config: Any) -> Change:
    return lambda folder: folder.config.update(config)


BAD: dict[str, tuple[Change, str]] = {
    "another type": (says(weights_dtype="float8_e4m3fn"), "'weights_dtype' of its quantization_config is not read"),
    "another type of a module": (says(modules_dtype_dict={"int5": ["a"]}), "'weights_dtype' of its"),
    "a type that it does not name": (says(weights_dtype="int4"), "'context_embedder.weight' does not fit its scales"),
    "a table of codes": (says(use_codebook=True), "'use_codebook' of its"),
    "scales of scales": (says(scale_dtype="uint8"), "'scale_dtype' of its"),
    "an unknown word": (says(use_lattice=True), "'use_lattice' of its"),
    "modules of their own": (says(modules_quant_config={"a": {"use_svd": True}}), "'modules_quant_config' of its"),
    "modules that are none": (says(modules_quant_config=["a"]), "'modules_quant_config' of its"),
    "a rotated branch": (says(use_svd=True, use_hadamard=True), "'use_svd' of its"),
    "a rotation of eight": (says(use_hadamard=True, hadamard_group_size=8), "rotated in groups that are not read"),
    "a rotation that does not fill": (says(use_hadamard=True), "rotated in groups that are not read"),
    "no scales": (lambda folder: folder.tensors.pop(f"{A}.scale"), f"'{A}.scale' is missing"),
    "codes too few": (becomes("weight", torch.zeros(7, dtype=torch.uint8)), f"'{A}.weight' does not fit its scales"),
    "scales of rows that are none": (becomes("scale", torch.ones(3, 5)), f"'{A}.zero_point' does not fit its scales"),
    "one zero point": (becomes("zero_point", torch.ones(1)), f"'{A}.zero_point' does not fit its scales"),
    "half a branch": (becomes("svd_up", torch.ones(32, 4)), f"'{A}.svd_down' does not fit its layer"),
    "integers of nothing": (lambda folder: folder.tensors.update(a=torch.ones(3, dtype=torch.int8)), "'a' belongs to no layer"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_trusted_is_one_error(what: str, some: Folder, tmp_path: Path) -> None:
    again = Folder(some.settings, dict(some.config), dict(some.tensors))
    change, words = BAD[what]
    change(again)
    with pytest.raises(ArtifactError, match=words):
        read(again.write(tmp_path / "bad"))


def test_folders_that_miss_something(some: Folder, tmp_path: Path) -> None:
    again = Folder(some.settings, some.config, dict(some.tensors))
    del again.tensors["x_embedder.bias"]
    with pytest.raises(ArtifactError, match="'x_embedder.bias' is missing"):
        convert(again.write(tmp_path / "a"), tmp_path / "out")
    (tmp_path / "a" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="holds no weights"):
        inspect_file(tmp_path / "a")
    wrong = Folder(some.settings | {"_class_name": "os"}, some.config, some.tensors)
    with pytest.raises(ModelError, match="names no network"):
        convert(wrong.write(tmp_path / "b"), tmp_path / "out")
    twice = some.write(tmp_path / "c", shards=2)
    some.write(twice)
    with pytest.raises(ArtifactError, match="in two files"):
        inspect_file(twice)
