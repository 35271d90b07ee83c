"""Stable Diffusion 1.5 with random weights: its networks as functions of tensors, and a picture in a few steps of LCM.

The scheduler takes what the U-Net returns for the image itself, so that latents keep their size through the steps although
nothing was learnt; the work is that of any other. Guidance is off, as with the distilled weights that people use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.engines.given import NETWORKS, Given
from benchmarks.networks import ARCHITECTURES
from benchmarks.pipelines import drawn, text_encoder, unet

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays], NDArray[Any]]

STEPS, PROMPT = 4, "a"
# width of the U-Net, side of the latents, width of the autoencoder, layers of the text encoder (0: one, of 8 channels inside)
SIZES = {"full": (1.0, 64, 1.0, 12), "half": (0.5, 32, 0.5, 6), "smoke": (0.1, 8, 0.125, 0)}
CLASSES = {
    "unet": (diffusers, "UNet2DConditionModel"),
    "vae": (diffusers, "AutoencoderKL"),
    "text_encoder": (transformers, "CLIPTextModel"),
}
CALIBRATION, TEST = 0, 1  # seeds
FACTOR = 0.18215  # of latents over those that the autoencoder made


class Network(nn.Module):
    """A network of the pipeline over its tensors by position, as converters want it."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *tensors: Tensor) -> Tensor:
        call = self.model.decode if self.name == "vae" else self.model
        out: Tensor = call(*tensors, return_dict=False)[0]
        return out


def read(folder: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model from the folder that it was saved in."""
    place, kind = CLASSES[name]
    model = getattr(place, kind).from_pretrained(folder, dtype=dtype, **options)
    return model.eval().requires_grad_(False)


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, safe_serialization=True)


def tensors(given: Arrays, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [torch.from_numpy(np.array(value)) for value in given.values()]
    return [value.to(dtype) if value.is_floating_point() else value for value in made]


def running(model: nn.Module, dtype: torch.dtype = torch.float32) -> Run:
    """A network in torch as a function of arrays."""

    def run(given: Arrays) -> NDArray[Any]:
        with torch.no_grad():
            out: NDArray[Any] = model(*tensors(given, dtype)).float().numpy()
            return out

    return run


def scheduler() -> LCMScheduler:
    return LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False
    )  # fmt: skip


def picture(networks: Mapping[str, Run], ids: NDArray[Any], noise: NDArray[Any], seed: int) -> NDArray[Any]:
    """What a pipeline does: text, steps, pixels."""
    steps, generator = scheduler(), torch.Generator().manual_seed(seed)
    text = networks["text_encoder"]({"input_ids": ids})
    steps.set_timesteps(STEPS)
    x = clean = torch.from_numpy(np.array(noise))
    for t in steps.timesteps:
        given = {"sample": x.numpy(), "timestep": t.reshape(1).numpy(), "encoder_hidden_states": text}
        seen = torch.from_numpy(np.array(networks["unet"](given)))
        x, clean = steps.step(seen, t, x, generator=generator, return_dict=False)
    return networks["vae"]({"latents": (clean / FACTOR).numpy()})


def text_network(layers: int) -> tuple[Any, Any]:
    tokenizer, narrow = text_encoder(768)
    if not layers:
        return tokenizer, narrow
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12, pad_token_id=1
    )  # fmt: skip
    return tokenizer, transformers.CLIPTextModel(config).eval()


def autoencoder(width: float) -> Any:
    asked = dict(ARCHITECTURES["vae"].config)
    asked["block_out_channels"] = tuple(round(one * width) for one in asked["block_out_channels"])
    asked["norm_num_groups"] = math.gcd(32, asked["block_out_channels"][0])
    with torch.device("meta"):
        model = AutoencoderKL(**asked)
    return drawn(model)


def prepare(given: Given, size: str) -> None:
    """The pipeline, the calls of its networks while it draws two pictures, and what float made of them."""
    torch.manual_seed(0)
    folder = given.subject
    width, latents, decoder, layers = SIZES[size]
    tokenizer, text = text_network(layers)
    pipe = StableDiffusionPipeline(
        autoencoder(decoder), text, tokenizer, unet(width, latents), scheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipeline")
    ids = tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="np").input_ids
    for seed, name in ((CALIBRATION, "calibration"), (TEST, "test")):
        noise = torch.randn(1, 4, latents, latents, generator=torch.Generator().manual_seed(seed)).numpy()
        (folder / name).mkdir()
        networks = {
            key: recorded(running(Network(getattr(pipe, key), key)), key, folder / name) for key in NETWORKS
        }
        wanted = picture(networks, ids, noise, seed)
        np.savez(folder / name / "picture-0.npz", input_ids=ids, noise=noise, wanted=wanted)


def recorded(run: Run, name: str, folder: Path) -> Run:
    """The same network, which writes down what it was given and what it returned."""
    count = 0

    def call(given: Arrays) -> NDArray[Any]:
        nonlocal count
        out = run(given)
        np.savez(folder / f"{name}-{count}.npz", wanted=out, **given)
        count += 1
        return out

    return call
