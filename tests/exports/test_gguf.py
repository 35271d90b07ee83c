"""GGUF files hold the artifact's integers, in blocks whose scales are those of rows or groups."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig
from safetensors.torch import load_file
from torch import Tensor

from stepquant.hub.exports.gguf_file import F32, Q4_0, Q4_1, Q8_0
from stepquant.job.export import export
from stepquant.runtime.layers.layer import IntegerLayer
from tests.exports.conftest import Make
from tests.exports.test_comfy import config_of
from tests.foreign.test_convert import predicted
from tests.runtime.synthetic import relative


def blocks(data: bytes, kind: str) -> list[float]:
    """What a block stands for, from its published layout, number by number."""
    (scale,) = struct.unpack_from("<e", data)
    if kind == "Q8_0":
        return [scale * q for q in struct.unpack_from("<32b", data, 2)]
    least = struct.unpack_from("<e", data, 2)[0] if kind == "Q4_1" else -8 * scale
    nibbles = data[4 if kind == "Q4_1" else 2 :]
    return [scale * (b & 15) + least for b in nibbles] + [scale * (b >> 4) + least for b in nibbles]


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_1])
def test_a_block_is_laid_out_as_published(kind: Any) -> None:
    torch.manual_seed(0)
    signed = kind.name != "Q4_1"
    low, high = {"Q8_0": (-127, 128), "Q4_0": (-8, 8), "Q4_1": (0, 16)}[kind.name]
    integers = torch.randint(low, high, (5, 32), dtype=torch.int16)
    scales = (torch.rand(5, 1) / 16 + 0.01).half()
    zero_points = (
        torch.zeros(5, 1, dtype=torch.int16) if signed else torch.arange(5, dtype=torch.int16)[:, None] * 3
    )
    made = kind.pack(integers, scales, zero_points)
    assert made.shape == (5, kind.bytes)
    want = (integers - zero_points) * scales.float()
    got = torch.tensor([blocks(bytes(row.tolist()), kind.name) for row in made])
    torch.testing.assert_close(got, want, rtol=0, atol=0 if signed else 1e-3)


def read(file: Path) -> dict[str, tuple[str, Tensor, tuple[int, ...]]]:
    """Every tensor by the gguf package: its type, its numbers, and its shape in torch's order."""
    gguf: Any = pytest.importorskip("gguf", reason="the outside reader is gguf")
    reader = gguf.GGUFReader(file)
    found = {}
    for one in reader.tensors:
        values = gguf.quants.dequantize(one.data, one.tensor_type)
        shape = tuple(int(side) for side in reversed(one.shape))
        found[one.name] = one.tensor_type.name, torch.from_numpy(np.array(values)).reshape(shape), shape
    return found


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("z_image", "w8a8-dynamic"), ("qwen_image", "w4a8-dynamic"), ("class_transformer", "w8a8-dynamic")],
)
def test_external_reader_finds_the_integers(name: str, scheme: str, rounded: Make, tmp_path: Path) -> None:
    model, _, folder = rounded(name, scheme)
    done = export(folder, tmp_path / "a.gguf", to="gguf", names="diffusers")
    written = read(tmp_path / "a.gguf")
    kinds = {fate.path: fate.becomes for fate in done.outlook.fates if fate.kept}
    assert {"Q8_0"} <= set(kinds.values()) if scheme == "w8a8-dynamic" else "Q4_0" in kinds.values()
    for path, kind in kinds.items():
        layer = model.get_submodule(path)
        integers, zero_points = layer.rows()
        want = ((integers - zero_points) * layer.weight_scale.half().float()[:, None]).reshape(
            layer.weight_shape
        )
        assert written[f"{path}.weight"][0] == kind
        assert torch.equal(written[f"{path}.weight"][1], want), path
    rest = model.dequantize().state_dict()
    assert set(written) == set(rest)
    for path, value in rest.items():
        if path.removesuffix(".weight") not in kinds:
            torch.testing.assert_close(written[path][1], value, rtol=2**-11, atol=2**-24, msg=path)


ARCHITECTURES = {
    "text_to_image": ("sd1", "attn1.to_q.weight"),
    "size_conditioned": ("sdxl", "attn1.to_q.weight"),
    "sd3": ("sd3", "x_block.attn.qkv.weight"),
    "flux2": ("flux", "img_attn.qkv.weight"),
    "qwen_image": ("qwen_image", "attn.to_q.weight"),
    "z_image": ("lumina2", "attention.qkv.weight"),
    "wan": ("wan", "self_attn.q.weight"),
    "ltx": ("ltxv", "attn1.to_q.weight"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_external_names_and_architecture_are_original(name: str, rounded: Make, tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf", reason="the outside reader is gguf")
    _, _, folder = rounded(name)
    export(folder, tmp_path / "a.gguf", to="gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    architecture, ending = ARCHITECTURES[name]
    assert reader.get_field("general.architecture").contents() == architecture
    most = gguf.LlamaFileType(reader.get_field("general.file_type").contents())
    counts: Counter[str] = Counter()
    for one in reader.tensors:
        counts[one.tensor_type.name] += one.n_elements
    # the narrowest of these networks have few rows of blocks, and others many convolutions
    usual = counts.most_common(1)[0][0]
    assert most.name == ("ALL_F32" if usual == "F32" else f"MOSTLY_{usual}")
    assert name != "z_image" or most.name == "MOSTLY_Q8_0"
    assert any(one.name.endswith(ending) for one in reader.tensors)


@pytest.mark.parametrize(("name", "names"), [("text_to_image", "diffusers"), ("wan", "original")])
def test_external_diffusers_computes_with_the_file(
    name: str, names: str, rounded: Make, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="diffusers reads such files with gguf")
    model, given, folder = rounded(name)
    done = export(folder, tmp_path / "a.gguf", to="gguf", names=names)
    assert {"Q8_0", "F16"} <= {fate.becomes for fate in done.outlook.fates}
    config_of(folder, tmp_path)
    loaded = type(model).from_single_file(
        str(tmp_path / "a.gguf"),
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    assert relative(predicted(loaded, given), predicted(model.dequantize(), given)) < 2e-3


def test_what_blocks_cannot_carry_is_said(calibrated: Path, tmp_path: Path) -> None:
    done = export(calibrated, tmp_path / "a.gguf", to="gguf")
    reasons = {fate.path: fate.reason for fate in done.outlook.fates}
    assert reasons["conv_out"] == "the rows of a convolution are no blocks of 32"
    assert reasons["mid_block.attentions.0.to_q"] == ""
    assert reasons["down_blocks.1.attentions.0.to_q"] == ""
    assert reasons["down_blocks.0.resnets.0.time_emb_proj"] == ""
    assert any("multiplied in float" in words for words in done.outlook.left)
    assert "names of diffusers" in done.outlook.notes[0]


def test_rotated_layers_have_no_blocks(rounded: Make, tmp_path: Path) -> None:
    model, _, folder = rounded("qwen_image", rotation=16)
    done = export(folder, tmp_path / "a.gguf", to="gguf")
    turned = {p for p, one in model.named_modules() if isinstance(one, IntegerLayer) and one.spec.rotation}
    assert turned
    assert all("no rotation" in fate.reason for fate in done.outlook.fates if fate.path in turned)


def test_floats_of_bfloat16_stay_what_they_are(rounded: Make, tmp_path: Path) -> None:
    model, _, folder = rounded("wan")
    type(model).from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    export(tmp_path / "half", tmp_path / "a.gguf", to="gguf", names="diffusers")
    export(tmp_path / "half", tmp_path / "a.safetensors", to="comfyui", names="diffusers")
    data = (tmp_path / "a.gguf").read_bytes()
    name, want = next(
        (name, value) for name, value in model.state_dict().items() if name.endswith("norm2.weight")
    )
    place = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    sides, side, kind = struct.unpack_from("<IQI", data, place)
    assert (sides, side, kind) == (1, len(want), F32.number)
    assert want.bfloat16().float().numpy().tobytes() in data
    assert load_file(tmp_path / "a.safetensors")[name].dtype == torch.bfloat16
