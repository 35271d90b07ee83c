"""Folders for SDNQ hold the artifact's integers; SDNQ itself reads them in a process of its own, because it is under the GPL."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.hub.exports import comfy, gguf, sdnq
from stepquant.hub.exports.at_rest import Network, at_rest
from stepquant.hub.exports.outlook import float_value
from stepquant.job.export import export
from stepquant.job.foreign import convert
from stepquant.progress import Silent
from tests.exports.conftest import Make
from tests.foreign.test_convert import predicted
from tests.runtime.synthetic import relative

WEIGHTS = "diffusion_pytorch_model.safetensors"
READ = """
import sys
import sdnq, torch, diffusers
from safetensors.torch import load_file, save_file
name, folder, given, out = sys.argv[1:]
model = getattr(diffusers, name).from_pretrained(folder, dtype=torch.float32)
kinds = {path: type(one).__name__ for path, one in model.named_modules()}
with torch.no_grad():
    predicted = model(**load_file(given), return_dict=False)[0]
save_file({"predicted": predicted.contiguous()}, out, {p: "" for p, kind in kinds.items() if kind.startswith("SDNQ")})
"""


def numbers(written: dict[str, Tensor], path: str, shape: torch.Size) -> tuple[str, Tensor]:
    """Type and weight of a layer by the published layout: two codes of 4 bits in a byte, the first in its lower half."""
    codes, scale = written[f"{path}.weight"], written.pop(f"{path}.scale")
    if codes.dtype == torch.int8:
        return "int8", codes * scale
    assert codes.dim() == 1
    codes = torch.tensor([half for byte in codes.tolist() for half in (byte % 16, byte // 16)]).reshape(shape)
    if f"{path}.zero_point" in written:
        return "uint4", codes * scale + written.pop(f"{path}.zero_point")
    return "int4", (codes - 8) * scale


def computed(name: str, given: dict[str, Any], place: Path) -> tuple[Tensor, set[str]]:
    """What SDNQ predicts with the folder `out`, and by which layers of its own."""
    save_file({key: value.contiguous() for key, value in given.items()}, place / "given.safetensors")
    made = place / "made.safetensors"
    words = [name, place / "out", place / "given.safetensors", made]
    subprocess.run([sys.executable, "-c", READ, *map(str, words)], check=True, timeout=300)
    with safe_open(made, framework="pt") as file:
        return file.get_tensor("predicted"), set(file.metadata())


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("text_to_image", "w8a8-dynamic"), ("qwen_image", "w4a8-dynamic"), ("text_to_image", "w4a16")],
)
def test_integers_and_scales_are_those_of_the_artifact(
    name: str, scheme: str, rounded: Make, tmp_path: Path
) -> None:
    model, _, folder = rounded(name, scheme)
    done = export(folder, tmp_path / "out", to="sdnq")
    written = load_file(tmp_path / "out" / WEIGHTS)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["_class_name"] == type(model).__name__
    floats = set(told["quantization_config"]["modules_to_not_convert"])
    back = model.dequantize().state_dict()
    kept = [fate.path for fate in done.outlook.fates if fate.kept]
    assert len(kept) > len(done.outlook.fates) / 2
    kinds = {fate.path: fate.becomes for fate in done.outlook.fates}
    types = told["quantization_config"].get("modules_dtype_dict", {})
    for path in kept:
        kind, value = numbers(written, path, back[f"{path}.weight"].shape)
        assert torch.equal(value, back[f"{path}.weight"]), path
        assert f"{path}.weight" not in floats
        others = {one for one, names in types.items() if f"{path}.weight" in names}
        assert others or {told["quantization_config"]["weights_dtype"]} == {kinds[path]}
        assert (others or {kind}) == {kind} == {kinds[path]}
    assert ("int4" in kinds.values()) == scheme.startswith("w4")
    assert set(written) == set(back)
    for path, value in back.items():
        if path.removesuffix(".weight") not in kept:
            torch.testing.assert_close(written[path].float(), value, rtol=2**-11, atol=2**-24)
    assert all(fate.reason for fate in done.outlook.fates if not fate.kept)


@pytest.mark.skipif(find_spec("sdnq") is None, reason="the outside reader is sdnq")
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("text_to_image", "w8a8-dynamic"),
        ("sd3", "w4a8-dynamic"),
        ("text_to_image", "w4a16"),
        ("flux", "w4a16"),
    ],
)
def test_external_sdnq_computes_with_the_folder(
    name: str, scheme: str, rounded: Make, tmp_path: Path
) -> None:
    model, given, folder = rounded(name, scheme)
    done = export(folder, tmp_path / "out", to="sdnq")
    got, ran = computed(type(model).__name__, given, tmp_path)
    assert ran == {fate.path for fate in done.outlook.fates if fate.kept}
    assert relative(got, predicted(model.dequantize(), given)) < 2e-3


def test_weights_with_an_offset_are_float_everywhere(rounded: Make) -> None:
    _, _, folder = rounded("wan")
    network = at_rest(folder)
    path, layer = next((p, one) for p, one in network.layers.items() if p.endswith("to_q"))
    layer.spec = replace(layer.spec, offset=True, input=None)
    layer.weight_offset = torch.full((len(layer.weight_scale),), 0.5)
    for format in (comfy, gguf, sdnq):
        fate = next(one for one in format.outlook(network).fates if one.path == path)
        assert fate.reason, format
    assert float_value(network, f"{path}.weight").mean() > 0.4


def test_integers_of_four_bits_are_read_back(rounded: Make, tmp_path: Path) -> None:
    model, _, folder = rounded("qwen_image", "w4a16")
    network = at_rest(folder)
    path = "transformer_blocks.0.attn.to_q"
    layer: Any = network.layers[path]
    layer.spec = replace(layer.spec, weight=Grid.parse("uint4/channel/asym"))
    layer.register_buffer("weight_zero_point", torch.arange(len(layer.weight_scale)).to(torch.int16) % 16)
    seen = sdnq.outlook(network)
    sdnq.write(network, seen, tmp_path / "out", Silent())
    assert {fate.becomes for fate in seen.fates} >= {"int4", "uint4"}
    convert(tmp_path / "out", tmp_path / "back")
    back = type(model).from_pretrained(tmp_path / "back").dequantize().state_dict()
    for one, own in network.layers.items():
        torch.testing.assert_close(
            back[f"{one}.weight"], own.dequantized(torch.float32), rtol=1e-6, atol=1e-6
        )


def grouped(folder: Path, out: Path) -> Network:
    """A network whose layers have rows, and groups of 4 and 8 bits, written for SDNQ."""
    network = at_rest(folder)
    for name, grid in {"to_q": "int4/group16", "to_k": "uint4/group8/asym", "to_v": "int8/group16"}.items():
        layer: Any = network.layers[f"transformer_blocks.0.attn.{name}"]
        scales = layer.weight_shape.numel() // Grid.parse(grid).group
        layer.spec = replace(layer.spec, weight=Grid.parse(grid))
        layer.weight_scale = torch.rand(scales) + 0.01
        integers = torch.randint(layer.spec.weight.qmin, layer.spec.weight.qmax + 1, layer.weight_shape)
        layer.weight = pack(integers, layer.spec.weight)
        if not layer.spec.weight.symmetric:
            layer.register_buffer("weight_zero_point", torch.arange(scales).to(torch.int16) % 16)
    seen = sdnq.outlook(network)
    assert all(fate.kept for fate in seen.fates if ".to_" in fate.path)
    sdnq.write(network, seen, out, Silent())
    return network


def test_groups_within_rows_are_read_back(rounded: Make, tmp_path: Path) -> None:
    model, _, folder = rounded("sd3", "w4a16")
    network = grouped(folder, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back")
    back = type(model).from_pretrained(tmp_path / "back").dequantize().state_dict()
    for one, own in network.layers.items():
        want = own.dequantized(torch.float32)
        torch.testing.assert_close(back[f"{one}.weight"], want, rtol=1e-6, atol=1e-5)


@pytest.mark.skipif(find_spec("sdnq") is None, reason="the outside reader is sdnq")
def test_external_sdnq_reads_groups_within_rows(rounded: Make, tmp_path: Path) -> None:
    model, given, folder = rounded("sd3", "w4a16")
    grouped(folder, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back")
    back = type(model).from_pretrained(tmp_path / "back").dequantize()
    got, ran = computed(type(model).__name__, given, tmp_path)
    assert len(ran) > 5
    assert relative(got, predicted(back, given)) < 2e-3
