"""Files for ComfyUI become folders that predict what the float network predicts, within eight bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

import stepquant
from stepquant import hub
from stepquant.job.foreign import convert, inspect_file
from stepquant.runtime.coverage import coverage
from stepquant.runtime.layers.layer import IntegerLayer
from tests.foreign.originals import ORIGINALS
from tests.foreign.writer import File, Packed, fast, file_of, fp8, int8, w4a4, w4a8
from tests.models.tiny import CASES
from tests.models.tiny.case import without_zeros
from tests.runtime.synthetic import relative

PREFIX = "model.diffusion_model."


def prefix_of(name: str) -> str:
    """Before the names in a file; some converters bear none."""
    return "" if name == "flux2" else PREFIX


def rotated(weight: Tensor) -> Packed:
    return int8(weight, next((group for group in (16, 4) if weight.shape[1] % group == 0), 0))


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, given, _ = CASES[name]()
    for own in without_zeros(model).parameters():
        own.requires_grad_(False)
    return model, given


def predicted(model: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        sample = model(**given, return_dict=False)[0]
    return torch.stack(list(sample)) if isinstance(sample, list) else sample


def packed_layers(
    tensors: dict[str, Tensor], linears: set[str], kind: Callable[[Tensor], Packed]
) -> dict[str, Packed]:
    """Every weight of two dimensions whose rows are those of linears; `tensors` loses them."""
    found = {}
    for name in [name for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2]:
        if name in linears:
            found[name.removesuffix(".weight")] = kind(tensors.pop(name))
    return found


def written(
    model: Any, name: str | None, kind: Callable[[Tensor], Packed], table: bool = False
) -> tuple[File, dict[str, Tensor]]:
    """A file of the network, in original names if it has them here, and the float tensors that it stands for, in diffusers' names."""
    original = ORIGINALS[name] if name else dict
    own = {path: value.detach().clone() for path, value in model.state_dict().items()}
    linears = {f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    marked = {path: torch.full_like(value, float(path in linears)) for path, value in own.items()}
    tensors = original(own)
    packed = packed_layers(tensors, {n for n, v in original(marked).items() if v.all()}, kind)
    floats = {**tensors, **{f"{path}.weight": layer.weight for path, layer in packed.items()}}
    if name:
        mapping = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
        given = {prefix_of(name) + path: value for path, value in floats.items()}
        floats = mapping(checkpoint=given, config=dict(model.config))
    return file_of(tensors, packed, table), floats


def folder_of(model: Any, tmp_path: Path) -> Path:
    model.save_config(tmp_path / "config")
    return tmp_path / "config"


KINDS = {"plain": int8, "rotated": rotated, "fast": lambda weight: fast(rotated(weight))}


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# What people have such files of; the last two in diffusers' names, as one is published, and as the other is where it is tiny.
NETWORKS = (*ORIGINALS, "qwen_image", "flux")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_by_every_way_in(name: str, tmp_path: Path) -> None:
    model, given = tiny(name)
    original = name if name in ORIGINALS else None
    file, floats = written(model, original, rotated)
    source = file.write(tmp_path / "some.safetensors", prefix_of(name) if original else "")
    config = folder_of(model, tmp_path)
    made = convert(source, tmp_path / "out", config=config)
    assert made.recipe["rotations"] == [4, 16] or made.recipe["rotations"] == [16]
    loaded = type(model).from_pretrained(tmp_path / "out")
    linears = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert made.layers == len(linears)
    assert all(isinstance(loaded.get_submodule(path), IntegerLayer) for path in linears)
    got = predicted(loaded, given)
    assert relative(got, predicted(model, given)) < 0.08
    assert coverage(loaded, given).share_of_planned == 1

    directly = stepquant.load(source, config=config)
    assert same(directly, loaded)
    assert torch.equal(predicted(directly, given), got)
    assert hub.config_of(directly).to_dict() == hub.config_of(loaded).to_dict()
    single = type(model).from_single_file(
        str(source), config=str(config), quantization_config=hub.StepquantConfig()
    )
    assert same(single, loaded)
    assert hub.config_of(single).recipe == made.recipe | {"model": type(model).__name__}

    back = loaded.dequantize().state_dict()
    assert set(back) == set(floats)
    for path, value in floats.items():
        torch.testing.assert_close(back[path], value.float(), rtol=0, atol=1e-6, msg=path)


@pytest.mark.parametrize(("kind", "table"), [("plain", False), ("fast", False), ("rotated", True)])
def test_names_of_diffusers_in_every_dialect(kind: str, table: bool, tmp_path: Path) -> None:
    model, given = tiny("flux")
    file, floats = written(model, None, KINDS[kind], table)
    source = file.write(tmp_path / "some.safetensors")
    convert(source, tmp_path / "out", config=folder_of(model, tmp_path) / "config.json")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.05
    found = inspect_file(source)
    assert found["dialect"] == ("metadata" if table else "INT8-Fast" if kind == "fast" else "native")
    assert bool(found["rotations"]) == (kind != "plain")
    assert all(row["integer"] for row in found["layers"])
    back = loaded.dequantize().state_dict()
    exact = kind == "plain"
    for path, value in floats.items():
        torch.testing.assert_close(back[path], value, rtol=0, atol=0 if exact else 1e-6, msg=path)


def test_one_scale_for_a_tensor_and_codes_of_minus_128(tmp_path: Path) -> None:
    model, given = tiny("qwen_image")
    file, floats = written(model, None, lambda weight: int8(weight, by_row=False))
    path = "transformer_blocks.0.attn.to_q"
    file.tensors[f"{path}.weight"][0, 0] = -128
    floats[f"{path}.weight"][0, 0] = -128 * file.tensors[f"{path}.weight_scale"]
    convert(file.write(tmp_path / "a.safetensors"), tmp_path / "out", config=folder_of(model, tmp_path))
    loaded = type(model).from_pretrained(tmp_path / "out")
    specs = {str(one.spec.weight) for one in loaded.modules() if isinstance(one, IntegerLayer)}
    assert specs == {"int8/tensor", "int8/tensor/asym"}
    assert loaded.get_submodule(path).integer
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.1
    back = loaded.dequantize().state_dict()
    assert all(torch.equal(back[name], value) for name, value in floats.items())


def test_fp8_becomes_float_and_the_rest_stays_integer(tmp_path: Path) -> None:
    model, given = tiny("sd3")
    file, floats = written(model, "sd3", lambda weight: fp8(weight) if weight.shape[1] > 32 else int8(weight))
    source = file.write(tmp_path / "some.safetensors", PREFIX)
    convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.1
    shown = inspect_file(source)
    assert set(shown["formats"]) == {"float8_e4m3fn", "int8_tensorwise"}
    assert {row["format"] for row in shown["layers"] if not row["integer"]} == {"float8_e4m3fn"}
    back = loaded.dequantize().state_dict()
    assert all(torch.equal(back[name].float(), value.float()) for name, value in floats.items())


def by_turns() -> Callable[[Tensor], Packed]:
    """The formats of codes that are always rotated, one after the other."""
    kinds = cycle((w4a4, w4a8, partial(w4a8, table=False), partial(w4a8, table=False, bits=6)))
    return lambda weight: next(kinds)(weight) if weight.shape[1] % 16 == 0 else int8(weight)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_codes_of_four_bits_and_of_tables_run_in_integers(name: str, tmp_path: Path) -> None:
    """A table and its scales stand for bytes, which are what is kept."""
    model, given = tiny(name)
    file, floats = written(model, name if name in ORIGINALS else None, by_turns())
    for entry in [entry for entry in file.tensors if entry.endswith("s_rel")][::2]:
        file.tensors[entry] = file.tensors[entry].view(torch.uint8)
    source = file.write(tmp_path / "some.safetensors", PREFIX if name in ORIGINALS else "")
    told = convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    loaded = type(model).from_pretrained(tmp_path / "out")
    layers = [one for one in loaded.modules() if isinstance(one, IntegerLayer)]
    assert {"convrot_w4a4", "asym_w4a8_int8"} <= set(told.recipe["formats"])
    assert {str(one.spec.weight) for one in layers} == {"int4/channel", "int8/channel"}
    assert all(one.integer for one in layers)
    assert all(row["integer"] for row in inspect_file(source)["layers"])
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.3
    back = loaded.dequantize().state_dict()
    for path, value in floats.items():
        torch.testing.assert_close(back[path], value.float(), rtol=0, atol=1e-6, msg=path)


def test_products_that_are_asked_for_in_float_are_in_float(tmp_path: Path) -> None:
    model, given = tiny("flux")
    file, _ = written(model, None, rotated)
    path = "transformer_blocks.0.attn.to_q"
    said = json.loads(bytes(file.tensors[f"{path}.comfy_quant"].tolist()))
    file.mark(path, said | {"full_precision_matrix_mult": True})
    source = file.write(tmp_path / "some.safetensors")
    convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert not loaded.get_submodule(path).integer
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.05
    assert [row["path"] for row in inspect_file(source)["layers"] if not row["integer"]] == [path]


def test_tensors_of_other_parts_are_left_where_they_are(tmp_path: Path) -> None:
    model, _ = tiny("wan")
    file, _ = written(model, "wan", int8)
    file.tensors = {PREFIX + name: value for name, value in file.tensors.items()}
    file.tensors["vae.decoder.weight"] = torch.ones(3)
    source = file.write(tmp_path / "some.safetensors")
    made = convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    assert inspect_file(source)["others"] == 1
    assert made.recipe["model"] == "some"
    assert hub.config_of(type(model).from_pretrained(tmp_path / "out")).recipe == made.recipe


def test_a_file_of_fp8_alone_loads_too(tmp_path: Path) -> None:
    model, given = tiny("flux")
    file, floats = written(model, None, fp8)
    made = convert(
        file.write(tmp_path / "a.safetensors"), tmp_path / "out", config=folder_of(model, tmp_path)
    )
    assert made.layers == 0
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.1
    assert all(torch.equal(loaded.state_dict()[name].float(), value) for name, value in floats.items())
