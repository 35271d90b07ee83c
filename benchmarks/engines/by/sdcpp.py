"""stable-diffusion.cpp through its Python package: weights of linears in q8_0, convolutions in float16.

It draws with noise of its own, so that no error is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file

from benchmarks.engines.given import Given
from benchmarks.engines.subject import PROMPT, STEPS

FILE = "model.gguf"


def prepare(given: Given, wtype: str) -> None:
    from stable_diffusion_cpp import StableDiffusion

    given.own.mkdir(parents=True)
    with TemporaryDirectory(dir=given.folder) as folder:
        place = Path(folder)
        named_as_before(given.subject / "pipeline", place)
        made = StableDiffusion().convert(str(place), output_path=str(given.own / FILE), output_type=wtype)
    if not made:
        raise ValueError("it cannot convert the folder")


def named_as_before(pipeline: Path, place: Path) -> None:
    """The pipeline with the names that text encoders had before transformers 5: by them it tells which model it reads."""
    for name in ("unet", "vae"):
        (place / name).symlink_to(pipeline / name)
    text = Path("text_encoder") / "model.safetensors"
    (place / text).parent.mkdir()
    tensors = load_file(pipeline / text)
    save_file({f"text_model.{name}": tensor for name, tensor in tensors.items()}, place / text)


def load_picture(given: Given, wtype: str) -> Callable[[], None]:
    from stable_diffusion_cpp import StableDiffusion

    shape = json.loads((given.subject / "pipeline" / "unet" / "config.json").read_text())
    side = shape["sample_size"] * 8
    model = StableDiffusion(model_path=str(given.own / FILE), n_threads=given.threads, vae_decode_only=True)

    def draw() -> None:
        model.generate_image(
            prompt=PROMPT, width=side, height=side, cfg_scale=1.0, sample_steps=STEPS, sample_method="lcm", seed=1
        )  # fmt: skip

    return draw
