"""stable-diffusion.cpp through its Python package: weights of linears in q8_0, convolutions in float16.

It draws with noise of its own, so that no error is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from benchmarks.engines.given import Given
from benchmarks.engines.subject import PROMPT, STEPS

FILE = "model.gguf"


def prepare(given: Given, wtype: str) -> None:
    from stable_diffusion_cpp import StableDiffusion

    given.own.mkdir(parents=True)
    made = StableDiffusion().convert(
        str(given.model.parent), output_path=str(given.own / FILE), output_type=wtype
    )
    if not made:
        raise ValueError("it cannot convert the folder")


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
