"""Float folders that diffusers loads with the name of a scheme."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DiffusionPipeline, StableDiffusionPipeline, UNet2DModel
from diffusers.quantizers import PipelineQuantizationConfig

from stepquant import hub, methods
from stepquant.calib.record import Source
from stepquant.errors import ModelError, PlanError, StepquantError, UnknownNameError
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("name", ["w8a8-dynamic", "w4a8-dynamic", "w4a16"])
def test_loading_makes_what_minmax_makes(source: Source, tmp_path: Path, name: str) -> None:
    source.pipeline.save_pretrained(tmp_path / "float")
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": hub.StepquantConfig(name)})
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=mapping)
    pipe = source.pipeline
    artifact = methods.build("minmax", {})(Denoiser.of(pipe), scheme(name), source)
    hub.attach(pipe.unet, artifact)
    assert same(loaded.unet, pipe.unet)
    images = run(loaded, [1, 2], Sampling(3))
    assert torch.equal(images, run(pipe, [1, 2], Sampling(3)))
    loaded.save_pretrained(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert same(again.unet, pipe.unet)
    assert hub.config_of(again.unet).to_dict() == hub.config_of(loaded.unet).to_dict()
    assert torch.equal(images, run(again, [1, 2], Sampling(3)))


def test_float_parts_follow_the_dtype_and_rounding_does_not(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    pipeline.unet.save_pretrained(tmp_path)
    config = hub.StepquantConfig("w8a8-dynamic")
    full, half = (
        UNet2DModel.from_pretrained(tmp_path, quantization_config=config, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    integers = {name for name in full.state_dict() if name.endswith("weight_scale")}
    assert integers
    assert all(torch.equal(full.state_dict()[name], half.state_dict()[name]) for name in integers)
    assert config.scheme == "w8a8-dynamic", "it may serve again"


@pytest.mark.parametrize(("name", "kind"), [("w8a8", PlanError), ("w9a9", UnknownNameError)])
def test_only_schemes_that_need_no_calibration(name: str, kind: type[StepquantError]) -> None:
    with pytest.raises(kind, match=name) as told:
        hub.StepquantConfig(name)
    assert "w8a8-dynamic" in str(told.value)


def test_what_cannot_be_rounded_is_one_error(
    pipeline: DDIMPipeline, text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    config = hub.StepquantConfig("w8a8-dynamic")
    text_pipeline.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match="AutoencoderKL"):
        AutoencoderKL.from_pretrained(tmp_path / "vae", quantization_config=config)
    text_pipeline.text_encoder.save_pretrained(tmp_path / "text")
    with pytest.raises(ModelError, match="only denoisers"):
        type(text_pipeline.text_encoder).from_pretrained(tmp_path / "text", quantization_config=config)
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = torch.nan
    pipeline.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ModelError, match=r"mid_block.resnets.0.conv1.weight.*NaN"):
        UNet2DModel.from_pretrained(tmp_path / "unet", quantization_config=config)
