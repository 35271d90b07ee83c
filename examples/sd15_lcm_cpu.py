"""Stable Diffusion 1.5 in four steps on a CPU: a distilled pipeline, quantized, saved, and drawn beside its float self.

    python examples/sd15_lcm_cpu.py --model FOLDER --out runs/lcm

FOLDER holds a Stable Diffusion 1.5 pipeline that was distilled to few steps, as LCM Dreamshaper v7, in safetensors. With
`--unet` it may be an ordinary one, whose U-Net is exchanged for that distilled one. Look at OUT/pictures.png: float above,
integers below, the same seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from PIL import Image

import stepquant as sq

CALIBRATE = (
    "a fox in the snow, photograph", "a harbour at night, oil painting", "portrait of an old sailor",
    "a red bicycle against a white wall", "a bowl of oranges, still life", "an astronaut in a field of flowers",
    "a street in the rain, neon lights", "a wooden cabin by a lake, morning mist",
)  # fmt: skip
SHOW = ("a lighthouse on a cliff, watercolour", "close-up of a tabby cat", "a train in the mountains")


def load(model: str, unet: str | None) -> Any:
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    if unet is not None:
        pipe.unet = UNet2DConditionModel.from_pretrained(unet, dtype=torch.float32)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, calls: list[dict[str, Any]]) -> tuple[np.ndarray, float]:
    """One picture a call, side by side, and the seconds of the last, when everything is warm."""
    pictures = []
    for seed, call in enumerate(calls):
        began = time.perf_counter()
        made = pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="np").images[0]
        pictures.append(made)
    return np.concatenate(pictures, axis=1), time.perf_counter() - began


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="folder of the pipeline")
    made.add_argument("--unet", help="folder of a distilled U-Net to put into it")
    made.add_argument("--out", type=Path, default=Path("runs/lcm"))
    made.add_argument("--method", default="minmax")
    made.add_argument("--scheme", default="w8a8")
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--size", type=int, default=512, help="height and width in pixels")
    made.add_argument("--samples", type=int, default=16, help="calibration records")
    return made


def main(asked: argparse.Namespace) -> None:
    shape = {"height": asked.size, "width": asked.size, "num_inference_steps": asked.steps}
    calls = [{"prompt": prompt, "guidance_scale": 8.0, **shape} for prompt in (*CALIBRATE, *SHOW)]
    shown = calls[len(CALIBRATE) :]  # prompts that calibration has not seen

    pipe = load(asked.model, asked.unet)
    before, seconds_float = draw(pipe, shown)

    sq.quantize(
        pipe, method=asked.method, scheme=asked.scheme, calls=calls[: len(CALIBRATE)], samples=asked.samples
    )
    pipe.save_pretrained(asked.out / "pipeline")

    # What anybody does with the folder afterwards: `import stepquant`, and diffusers' own loading.
    loaded = DiffusionPipeline.from_pretrained(asked.out / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    after, seconds = draw(loaded, shown)

    rows = (np.concatenate([before, after]) * 255).round().astype(np.uint8)
    Image.fromarray(rows).save(asked.out / "pictures.png")
    print(f"one picture: {seconds_float:.1f} s in float, {seconds:.1f} s in integers")
    print(f"PSNR to float: {-10 * np.log10(np.square(before - after).mean() + 1e-12):.1f} dB")
    print(f"see {asked.out / 'pictures.png'}")


if __name__ == "__main__":
    main(parser().parse_args())
