"""Files that run without a folder in between, by `stepquant.load` and by `from_single_file` of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from huggingface_hub import constants
from torch import Tensor, nn

import stepquant
from stepquant import hub
from stepquant.errors import ArtifactError, ModelError, StepquantError
from stepquant.hub import StepquantConfig
from stepquant.hub.foreign.read import read
from stepquant.hub.foreign.settings import repository_of
from stepquant.job.foreign import convert
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from tests.foreign.gguf_writer import KINDS, write_gguf
from tests.foreign.test_convert import PREFIX, folder_of, predicted, rotated, same, tiny, written
from tests.foreign.test_gguf import packed
from tests.foreign.writer import fp8, int8
from tests.runtime.synthetic import relative


class Blocks(nn.Parameter):
    """Bytes of blocks as diffusers hands them on where the gguf package is installed."""

    quant_type: int


def as_diffusers_reads(tensors: dict[str, Any]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            made[name] = value
            continue
        kind = KINDS[value.kind]
        row = value.shape[-1] // kind.numbers * kind.bytes
        data = torch.frombuffer(bytearray(value.data), dtype=torch.uint8).reshape(*value.shape[:-1], row)
        made[name] = Blocks(data, requires_grad=False)
        made[name].quant_type = kind.number  # type: ignore[attr-defined]
    return made


def test_gguf_runs_in_its_blocks(tmp_path: Path) -> None:
    model, given = tiny("wan")
    own = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = ("Q8_0", "Q4_1", "Q5_0")
    made = packed({name: value for name, value in own.items() if value.shape[-1] % 32 == 0}, kinds)
    made = {name: value.half() for name, value in own.items()} | made
    source, config = write_gguf(tmp_path / "some.gguf", made), folder_of(model, tmp_path)
    loaded = stepquant.load(source, config=config)
    convert(source, tmp_path / "out", config=config)
    folder = type(model).from_pretrained(tmp_path / "out")
    assert same(loaded, folder)
    assert torch.equal(predicted(loaded, given), predicted(folder, given))
    tensors = as_diffusers_reads(made)
    single = type(model).from_single_file(tensors, config=str(config), quantization_config=StepquantConfig())
    assert same(single, folder)
    assert set(hub.config_of(single).recipe["formats"]) == set(kinds)


def test_external_gguf_files_are_read_by_from_single_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="diffusers reads such files with gguf")
    model, _ = tiny("wan")
    own = {name: value.clone() for name, value in model.state_dict().items()}
    made = {name: value.bfloat16() for name, value in own.items()}
    made |= packed(
        {name: value for name, value in own.items() if value.shape[-1] % 32 == 0}, ("Q8_0", "Q5_1")
    )
    source, config = write_gguf(tmp_path / "some.gguf", made), folder_of(model, tmp_path)
    single = type(model).from_single_file(
        str(source), config=str(config), quantization_config=StepquantConfig()
    )
    assert same(single, stepquant.load(source, config=config))


def test_a_pipeline_denoises_by_the_network_of_a_file(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    source = written(pipeline.unet, None, rotated)[0].write(tmp_path / "some.safetensors")
    made = stepquant.load(source, config=folder)
    convert(source, tmp_path / "out", config=folder)
    assert same(made.unet, type(pipeline.unet).from_pretrained(tmp_path / "out"))
    assert hub.config_of(made.unet).recipe["program"] == "ComfyUI"
    assert run(made, [1], Sampling(2)).isfinite().all()
    (folder / "unet_2").mkdir()
    with pytest.raises(ModelError, match="which network the file is of"):
        stepquant.load(source, config=folder)
    with pytest.raises(StepquantError, match="says itself what it is"):
        stepquant.load(folder, config=folder)


def test_a_scheme_rounds_what_integers_cannot_multiply(tmp_path: Path) -> None:
    model, given = tiny("flux")
    source = written(model, None, fp8)[0].write(tmp_path / "some.safetensors")
    config = folder_of(model, tmp_path)
    loaded = stepquant.load(source, config=config, scheme="w8a8-dynamic")
    convert(source, tmp_path / "out", config=config, scheme="w8a8-dynamic")
    assert same(loaded, type(model).from_pretrained(tmp_path / "out"))
    assert hub.config_of(loaded).recipe["scheme"] == "w8a8-dynamic"
    assert relative(predicted(loaded, given), predicted(model, given)) < 0.1


def test_what_was_widened_is_saved_and_loaded_again(tmp_path: Path) -> None:
    """Floats of 16 bits in the folder that `convert` writes have 32 in memory, and in what is saved from there."""
    model, _ = tiny("flux")
    source = written(model, None, fp8)[0].write(tmp_path / "some.safetensors")
    convert(source, tmp_path / "out", config=folder_of(model, tmp_path))
    once = type(model).from_pretrained(tmp_path / "out")
    once.save_pretrained(tmp_path / "again")
    assert same(type(model).from_pretrained(tmp_path / "again"), once)


def test_what_diffusers_does_not_hand_on_is_refused(tmp_path: Path) -> None:
    model, _ = tiny("flux")
    config, kind = str(folder_of(model, tmp_path)), type(model)
    table = written(model, None, int8, table=True)[0].write(tmp_path / "table.safetensors")
    with pytest.raises(ArtifactError, match=r"stepquant.load\(FILE"):
        kind.from_single_file(str(table), config=config, quantization_config=StepquantConfig())
    source = written(model, None, int8)[0].write(tmp_path / "some.safetensors")
    with pytest.raises(ModelError, match="packed already"):
        kind.from_single_file(str(source), config=config, quantization_config=StepquantConfig("w8a8-dynamic"))


def test_the_configuration_of_a_known_network_is_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("z_image")
    file = written(model, "z_image", int8)[0]
    source = file.write(tmp_path / "some.safetensors", PREFIX)
    assert repository_of(read(source)) == "Tongyi-MAI/Z-Image-Turbo"
    with pytest.raises(ModelError, match="hf download Tongyi-MAI/Z-Image-Turbo"):
        stepquant.load(source)
    cached = tmp_path / "cache" / "models--Tongyi-MAI--Z-Image-Turbo"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    model.save_config(cached / "snapshots" / "abc" / "transformer")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert same(stepquant.load(source), stepquant.load(source, config=folder_of(model, tmp_path)))


def test_no_repository_is_guessed(tmp_path: Path) -> None:
    model, _ = tiny("flux")  # in diffusers' names, which say nothing
    source = written(model, None, int8)[0].write(tmp_path / "some.safetensors")
    assert repository_of(read(source)) is None
    with pytest.raises(ModelError, match="the file does not say what the network is") as told:
        stepquant.load(source)
    assert "hf download" not in str(told.value)
