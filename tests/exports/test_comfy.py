"""Files for ComfyUI hold the artifact's integers, and come back as what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from stepquant.errors import StepquantError
from stepquant.hub import on_load
from stepquant.job.export import export
from stepquant.job.foreign import convert, inspect_file
from stepquant.models.originals import in_original_names
from stepquant.runtime.layers.layer import IntegerLayer
from tests.exports.conftest import Make
from tests.foreign.test_convert import predicted
from tests.runtime.synthetic import relative

# Networks of linears, and the group that rotates. FLUX.1 has original names at its true width alone, see below.
LINEARS = {"sd3_dual": None, "wan": 4, "z_image": 4, "qwen_image": None, "flux2": 16, "ltx": None}


@pytest.fixture(autouse=True)
def attention_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files say nothing of attention, which is in float where they come back."""
    monkeypatch.setattr(on_load, "products_of", lambda *_: {})


def config_of(folder: Path, tmp_path: Path) -> Path:
    """The configuration of the float network beside an artifact."""
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    return file


def returned(model: Any, file: Path, folder: Path, tmp_path: Path) -> Any:
    convert(file, tmp_path / "back", config=config_of(folder, tmp_path))
    return type(model).from_pretrained(tmp_path / "back")


@pytest.mark.parametrize("name", LINEARS)
def test_original_names_and_back(name: str, rounded: Make, tmp_path: Path) -> None:
    rotation = LINEARS[name]
    model, given, folder = rounded(name, rotation=rotation)
    file = tmp_path / "some.safetensors"
    done = export(folder, file, to="comfyui")
    assert not done.outlook.notes
    found = inspect_file(file)
    assert found["dialect"] == "native"
    assert bool(found["rotations"]) == (rotation is not None)
    back = returned(model, file, folder, tmp_path)
    want, got = model.state_dict(), back.state_dict()
    kept = {fate.path for fate in done.outlook.fates if fate.kept}
    assert kept == {p for p, one in back.named_modules() if isinstance(one, IntegerLayer)}
    assert len(kept) >= len(done.outlook.fates) - 1  # a patch embedding may be a convolution
    for path in kept:
        for leaf in ("weight", "weight_scale"):
            assert torch.equal(got[f"{path}.{leaf}"], want[f"{path}.{leaf}"]), path
    assert relative(predicted(back, given), predicted(model, given)) < 0.01


@pytest.mark.parametrize("name", ["text_to_image", "size_conditioned"])
def test_convolutions_become_float_and_linears_stay(name: str, rounded: Make, tmp_path: Path) -> None:
    model, given, folder = rounded(name)
    file = tmp_path / "some.safetensors"
    done = export(folder, file, to="comfyui")
    convolutions = {fate.path for fate in done.outlook.fates if not fate.kept}
    written = load_file(file)
    assert written["input_blocks.1.0.in_layers.2.weight"].dtype == torch.float16
    back = returned(model, file, folder, tmp_path)
    assert relative(predicted(back, given), predicted(model, given)) < 0.05
    want, got = model.dequantize().state_dict(), back.dequantize().state_dict()
    for name, value in want.items():
        if name.removesuffix(".weight") in convolutions:
            torch.testing.assert_close(got[name], value, rtol=2**-11, atol=2**-24)
        else:
            assert torch.equal(got[name], value), name


def test_what_is_left_behind_is_said(calibrated: Path, tmp_path: Path) -> None:
    done = export(calibrated, tmp_path / "a.safetensors", to="comfyui")
    assert any("the ranges of the inputs of" in words for words in done.outlook.left)
    assert any("products of attention" in words for words in done.outlook.left)
    assert "of UNet2DModel are not known" in done.outlook.notes[0]
    reasons = {fate.path: fate.reason for fate in done.outlook.fates}
    assert reasons["conv_out"] == "ComfyUI has no quantized convolution"
    assert reasons["mid_block.attentions.0.to_q"] == ""
    # Weights alone in integers are multiplied in float there too.
    marker = bytes(load_file(tmp_path / "a.safetensors")["time_embedding.linear_1.comfy_quant"].tolist())
    assert json.loads(marker) == {"format": "int8_tensorwise", "full_precision_matrix_mult": True}


def test_scales_of_groups_are_no_scales_of_rows(rounded: Make, tmp_path: Path) -> None:
    model, _, folder = rounded("qwen_image", "w4a8-dynamic")
    done = export(folder, tmp_path / "a.safetensors", to="comfyui")
    specs = {path: one.spec.weight for path, one in model.named_modules() if isinstance(one, IntegerLayer)}
    for fate in done.outlook.fates:
        assert fate.kept == (specs[fate.path].granularity != "group"), fate
    assert done.outlook.kept  # four bits in a byte each
    back = returned(model, tmp_path / "a.safetensors", folder, tmp_path)
    want, got = model.dequantize().state_dict(), back.dequantize().state_dict()
    kept = {fate.path for fate in done.outlook.fates if fate.kept}
    assert all(torch.equal(got[f"{path}.weight"], want[f"{path}.weight"]) for path in kept)


def test_names_of_flux_at_its_true_width() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=1, guidance_embeds=True)
    rows = {name: torch.arange(value.shape[0]) for name, value in model.state_dict().items()}
    made = in_original_names("FluxTransformer2DModel", rows, model.config)
    assert made is not None
    assert len(made["single_blocks.0.linear1.weight"]) == 7 * 3072
    assert {"double_blocks.1.txt_attn.norm.key_norm.scale", "guidance_in.in_layer.bias"} <= set(made)


def test_names_that_do_not_come_back_are_refused(rounded: Make, tmp_path: Path) -> None:
    model, given, folder = rounded("flux")  # narrower than any that was published
    file = tmp_path / "a.safetensors"
    with pytest.raises(StepquantError, match="no original names"):
        export(folder, file, to="comfyui")
    assert not file.exists()
    export(folder, file, to="comfyui", names="diffusers")
    assert relative(predicted(returned(model, file, folder, tmp_path), given), predicted(model, given)) < 1e-3


def test_external_kitchen_computes_the_same(rounded: Make, tmp_path: Path) -> None:
    kitchen: Any = pytest.importorskip("comfy_kitchen", reason="the outside reference is comfy-kitchen")
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout

    model, _, folder = rounded("qwen_image", rotation=16)
    export(folder, tmp_path / "a.safetensors", to="comfyui")
    written, path = load_file(tmp_path / "a.safetensors"), "transformer_blocks.0.attn.to_q"
    codes, scales = written[f"{path}.weight"], written[f"{path}.weight_scale"]
    said = json.loads(bytes(written[f"{path}.comfy_quant"].tolist()))
    rotation = {"convrot": said["convrot"], "convrot_groupsize": said["convrot_groupsize"]}
    params = TensorWiseINT8Layout.Params(
        scale=scales, orig_dtype=torch.float32, orig_shape=tuple(codes.shape), **rotation
    )
    ours = model.get_submodule(path)
    want = TensorWiseINT8Layout.dequantize(codes, params)
    torch.testing.assert_close(ours.dequantized(torch.float32), want.float(), rtol=0, atol=1e-6)
    x = torch.randn(9, codes.shape[1])
    with torch.no_grad(), kitchen.use_backend("eager"):
        y = kitchen.int8_linear(x, codes, scales, written[f"{path}.bias"], torch.float32, **rotation)
        assert relative(nn.Module.__call__(ours, x), y) < 2e-3
