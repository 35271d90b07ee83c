from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from stepquant import hub, methods
from stepquant.calib.record import Source
from stepquant.errors import ArtifactError, RuntimeSupportError
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.sampling import SAMPLERS, Sampling
from stepquant.quant.schemes import SCHEMES, scheme

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
IMAGES = """
import sys, torch, stepquant
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
save_file({"images": run(pipe, [1, 2], Sampling(3))}, sys.argv[2])
"""


def quantized(source: Source, name: str = "w8a8") -> DDIMPipeline:
    pipe = source.pipeline
    artifact = methods.build("minmax", {"samples": 8, "batch": 8})(Denoiser.of(pipe), scheme(name), source)
    hub.attach(pipe.unet, artifact)
    return pipe


@pytest.mark.parametrize("name", SCHEMES)
def test_save_load_generate_is_bit_identical(source: Source, tmp_path: Path, name: str) -> None:
    pipe = quantized(source, name)
    before = run(pipe, [1, 2], Sampling(3))
    pipe.save_pretrained(tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(run(loaded, [1, 2], Sampling(3)), before)
    assert hub.config_of(loaded.unet).to_dict() == hub.config_of(pipe.unet).to_dict()
    alone = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert {k: v.dtype for k, v in alone.state_dict().items()} == {
        k: v.dtype for k, v in pipe.unet.state_dict().items()
    }
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_a_fresh_process_gives_the_same_images(source: Source, tmp_path: Path) -> None:
    pipe = quantized(source)
    pipe.save_pretrained(tmp_path / "out")
    subprocess.run(
        [sys.executable, "-c", IMAGES, str(tmp_path / "out"), str(tmp_path / "images")], check=True
    )
    assert torch.equal(load_file(tmp_path / "images")["images"], run(pipe, [1, 2], Sampling(3)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_after_quantization(source: Source, sampler: str) -> None:
    assert torch.isfinite(run(quantized(source), [0], Sampling(3, sampler))).all()


def test_scales_survive_a_half_precision_load_and_float_parts_follow_it(
    source: Source, tmp_path: Path
) -> None:
    """diffusers casts floating tensors to dtype before a quantizer sees them."""
    pipe = quantized(source)
    pipe.save_pretrained(tmp_path / "out")
    half = UNet2DModel.from_pretrained(tmp_path / "out" / "unet", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    again = UNet2DModel.from_pretrained(tmp_path / "half")
    floats = dict(pipe.unet.named_parameters())
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.bfloat16() if name in floats else value), name
        assert torch.equal(again.state_dict()[name], half.state_dict()[name].to(value.dtype)), name
    with torch.no_grad():
        out = half(torch.randn(1, 3, 8, 8).bfloat16(), 5).sample
    assert out.dtype == torch.bfloat16
    with pytest.raises(RuntimeSupportError, match=r"dtype=torch\.float16.*cannot follow"):
        UNet2DModel.from_pretrained(tmp_path / "out" / "unet", dtype=torch.float16)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", "balanced"])
def test_a_device_map_of_one_device_loads_the_same_network(
    source: Source, tmp_path: Path, device_map: object
) -> None:
    unet, x = quantized(source).unet, torch.randn(1, 3, 8, 8)
    unet.save_pretrained(tmp_path / "out")
    loaded = UNet2DModel.from_pretrained(tmp_path / "out", device_map=device_map)
    with torch.no_grad():
        want = unet(x, 5).sample
        for _ in range(3):
            assert torch.equal(loaded(x, 5).sample.cpu(), want)


def test_a_device_that_is_full_while_loading_says_what_is_needed(source: Source) -> None:
    class Full:
        def to(self, device: torch.device) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")

    unet = quantized(source).unet
    quantizer, name = hub.StepquantQuantizer(hub.config_of(unet)), "conv_in.weight"
    quantizer.size = 123_456
    with pytest.raises(RuntimeSupportError, match=r"device 'cpu' cannot hold(.|\n)*123,456 bytes free"):
        quantizer.create_quantized_param(unet, None, name, torch.device("cpu"), {name: Full()})


def edit(change: Callable[[dict[str, torch.Tensor]], None], folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("conv_in.weight_scale"), r"conv_in\.weight_scale' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is foreign"),
        (
            lambda t: t["conv_out.weight"].__setitem__(0, t["conv_out.weight"][0] ^ 1),
            r"conv_out\.weight' was altered",
        ),
        (lambda t: t["conv_in.weight_scale"].mul_(1.0001), r"conv_in\.weight_scale' was altered"),
        (
            lambda t: t.update({"conv_in.bias": t["conv_in.bias"][:-1].clone()}),
            r"conv_in\.bias' has the wrong shape",
        ),
    ],
)
def test_an_edited_artifact_names_the_tensor(
    source: Source, tmp_path: Path, change: Callable, message: str
) -> None:
    quantized(source).save_pretrained(tmp_path / "out")
    edit(change, tmp_path / "out")
    with pytest.raises(ArtifactError, match=message):
        UNet2DModel.from_pretrained(tmp_path / "out" / "unet")


def test_a_truncated_file_is_refused(source: Source, tmp_path: Path) -> None:
    quantized(source).save_pretrained(tmp_path / "out")
    data = (tmp_path / "out" / WEIGHTS).read_bytes()
    (tmp_path / "out" / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises((ArtifactError, OSError), match="weights"):
        UNet2DModel.from_pretrained(tmp_path / "out" / "unet")


def test_a_foreign_configuration_is_refused(source: Source, tmp_path: Path) -> None:
    quantized(source).save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps(config | {"quantization_config": config["quantization_config"] | {"digests": {}}})
    )
    with pytest.raises(ArtifactError, match="config.json was edited"):
        UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    file.write_text(
        json.dumps(config | {"quantization_config": config["quantization_config"] | {"format": 99}})
    )
    with pytest.raises(ArtifactError, match="format 99"):
        UNet2DModel.from_pretrained(tmp_path / "out" / "unet")


def test_diffusers_conventions(source: Source) -> None:
    unet = quantized(source).unet
    assert unet.is_quantized
    assert unet.quantization_method.value == "stepquant"
    for call in (unet.half, unet.float, lambda: unet.to(torch.float16)):
        with pytest.raises(ValueError, match="quantized|casting"):
            call()
    json.dumps(unet.hf_quantizer.quantization_config.to_dict())
    assert "StepquantConfig" in repr(unet.hf_quantizer.quantization_config)


def test_a_float_checkpoint_needs_calibration(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="pre-quantized"):
        UNet2DModel.from_pretrained(
            tmp_path / "float" / "unet", quantization_config=hub.StepquantConfig(layers={})
        )


def test_the_file_shrinks(source: Source, tmp_path: Path) -> None:
    source.pipeline.save_pretrained(tmp_path / "float")
    quantized(source, "w8a8").save_pretrained(tmp_path / "out")
    packed = sum(v.numel() * v.element_size() for v in load_file(tmp_path / "out" / WEIGHTS).values())
    full = sum(v.numel() * v.element_size() for v in load_file(tmp_path / "float" / WEIGHTS).values())
    assert packed < 0.35 * full, "tiny layers carry many scales; the embedded model reaches 0.27"
