"""Models that are never all there: the same folder as ever, in little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepquant.cli import main
from stepquant.errors import ModelError, StepquantError
from stepquant.job import Recipe, passing, quantize_to
from stepquant.job.tensors import KINDS, Writer, places_in
from tests.job.test_job import contents
from tests.models.tiny.joint import sd3

CONFIGS = "config.json", "model_index.json"


def recipe(model: Path, scheme: str = "w4a16", **changes: Any) -> Recipe:
    return Recipe.of(**{"model": str(model), "method": "minmax", "scheme": scheme} | changes)


@pytest.fixture
def saved(text_pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """A pipeline of several parts as a folder, its denoiser in bfloat16 and in several files."""
    folder = tmp_path / "float"
    text_pipeline.unet.to(torch.bfloat16)
    text_pipeline.save_pretrained(folder)
    text_pipeline.unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8-dynamic"])
def test_the_folder_is_the_same(saved: Path, tmp_path: Path, scheme: str) -> None:
    asked = recipe(saved, scheme)
    usual = quantize_to(asked, tmp_path / "usual")
    passed = quantize_to(asked, tmp_path / "passed", low_memory=True)
    assert (passed.recipe, passed.weights_bytes, passed.share) == (
        usual.recipe,
        usual.weights_bytes,
        usual.share,
    )
    mine, theirs = contents(passed.out), contents(usual.out)
    for name in [name for name in theirs if name.startswith("unet/") or name.endswith(".safetensors")]:
        same = json.loads if name.endswith(CONFIGS) else bytes
        assert same(mine[name]) == same(theirs[name]), name
    assert DiffusionPipeline.from_pretrained(passed.out).unet.conv_in.weight.isfinite().all()
    assert str(tmp_path) not in b"".join(mine[name] for name in mine if name.endswith(CONFIGS)).decode()


@pytest.fixture
def with_places(class_pipeline: DiTPipeline, tmp_path: Path) -> Path:
    """A pipeline in bfloat16 whose transformer is saved with a table of places."""
    class_pipeline.register_modules(transformer=sd3()[0].to(torch.bfloat16))
    class_pipeline.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_tables_are_saved_in_the_type_of_their_files(with_places: Path, tmp_path: Path) -> None:
    """And computed with in float32, as the float model is."""
    asked = recipe(with_places, "w4a16")
    usual = quantize_to(asked, tmp_path / "usual").out / "transformer"
    passed = quantize_to(asked, tmp_path / "passed", low_memory=True).out / "transformer"
    file = "diffusion_pytorch_model.safetensors"
    assert (usual / file).read_bytes() == (passed / file).read_bytes()
    read = json.loads
    assert read((usual / "config.json").read_text()) == read((passed / "config.json").read_text())
    table = load_file(with_places / "transformer" / file)["pos_embed.pos_embed"]
    assert table.dtype == torch.bfloat16
    assert torch.equal(load_file(passed / file)["pos_embed.pos_embed"], table)
    made = SD3Transformer2DModel.from_pretrained(passed)
    assert made.pos_embed.pos_embed.dtype == torch.float32
    made.save_pretrained(tmp_path / "again")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again.pos_embed.pos_embed, table.float())


def test_artifacts_are_cut_into_files_as_diffusers_cuts_them(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "SHARD", "50KB")
    quantize_to(recipe(saved), tmp_path / "passed", low_memory=True)
    made = DiffusionPipeline.from_pretrained(tmp_path / "passed")
    made.unet.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    first, again = (
        {name: data for name, data in contents(folder).items() if "safetensors" in name}
        for folder in (tmp_path / "passed" / "unet", tmp_path / "again")
    )
    assert len(first) > 2
    assert first == again


def test_resume_knows_what_is_there(saved: Path, tmp_path: Path) -> None:
    first = quantize_to(recipe(saved), tmp_path / "out", low_memory=True)
    with pytest.raises(StepquantError, match="exists already"):
        quantize_to(recipe(saved), tmp_path / "out", low_memory=True)
    again = quantize_to(recipe(saved), tmp_path / "out", low_memory=True, resume=True)
    assert again.found
    assert again.recipe == first.recipe
    with pytest.raises(StepquantError, match="another recipe"):
        quantize_to(recipe(saved, "w8a16"), tmp_path / "out", low_memory=True, resume=True)


def test_damaged_files_are_one_error(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "unet" / "diffusion_pytorch_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    tensors.pop("conv_in.weight")
    save_file(tensors, tmp_path / "less")
    infinite = tensors | {"conv_in.weight": torch.full((16, 3, 3, 3), torch.inf)}
    save_file(infinite, tmp_path / "infinite")
    for data, told in (
        (whole[:-40], "damaged"),
        (whole[:40], "damaged"),
        (b"\xff" * 40, "damaged"),
        ((tmp_path / "less").read_bytes(), "'conv_in.weight' is in no file"),
        ((tmp_path / "infinite").read_bytes(), "NaN or infinite"),
    ):
        file.write_bytes(data)
        with pytest.raises(ModelError, match=told):
            quantize_to(recipe(tmp_path / "float"), tmp_path / "out", low_memory=True)
        assert not (tmp_path / "out").exists()


def test_files_written_in_pieces_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {f"b.{name}": torch.arange(6).reshape(2, 3).to(kind) for name, kind in KINDS.items()}
    tensors |= {"a": torch.rand(4), "ä": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with Writer(tmp_path / "mine", {name: value.to("meta") for name, value in tensors.items()}) as writer:
        for name in reversed(tensors):
            writer.put(name, tensors[name])
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()
    with safe_open(tmp_path / "theirs", "pt") as file:
        for name, place in places_in(tmp_path / "mine").items():
            assert torch.equal(place.read(), file.get_tensor(name))


def test_the_command(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(saved), "--method", "minmax", "--scheme", "w4a16", "--low-memory"]
    assert main([*words, "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} >= {"model_index.json", "unet", "vae"}
    assert not (out / "README.md").exists()
