"""A class-conditional transformer (DiT) in integers: every class drawn by the float model and by what it became.

    python examples/dit_classes.py --out runs/dit
    python examples/dit_classes.py --model FOLDER --classes 207,360,387 --steps 50 --out runs/dit-xl

Without `--model` it is the embedded transformer; a folder of DiT-XL/2 goes the same way. Look at OUT/pictures.png: a column
a class, float above, integers below, from the same noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import stepquant as sq


def draw(pipe: Any, classes: list[int], steps: int) -> tuple[np.ndarray, float]:
    """A picture of each class, and the seconds that one takes when everything is warm."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for label in classes:
        began, noise = time.perf_counter(), torch.Generator().manual_seed(label)
        made = pipe([label], num_inference_steps=steps, generator=noise, output_type="np").images[0]
        pictures.append(made)
    return np.concatenate(pictures, axis=1), time.perf_counter() - began


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="stepquant:characters-dit", help="an embedded model or a folder")
    made.add_argument("--classes", default="0,1,2,3,4,5,6,7", help="numbers of classes to draw")
    made.add_argument("--method", default="ptq4dm")
    made.add_argument("--scheme", default="w8a8")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--samples", type=int, default=128, help="calibration records")
    made.add_argument("--out", type=Path, default=Path("runs/dit"))
    return made


def main(asked: argparse.Namespace) -> None:
    classes = [int(word) for word in asked.classes.split(",")]
    pipe = sq.load(asked.model)
    before, seconds_float = draw(pipe, classes, asked.steps)

    # Classes are calibrated in turn: nobody has to name them.
    sq.quantize(pipe, method=asked.method, scheme=asked.scheme, samples=asked.samples, steps=asked.steps)
    pipe.save_pretrained(asked.out / "pipeline")
    after, seconds = draw(DiffusionPipeline.from_pretrained(asked.out / "pipeline"), classes, asked.steps)

    both = np.concatenate([before, after])
    Image.fromarray((both * 255).round().astype(np.uint8)).save(asked.out / "pictures.png")
    print(f"one picture: {seconds_float:.2f} s in float, {seconds:.2f} s in integers")
    print(f"PSNR to float: {-10 * np.log10(np.square(before - after).mean() + 1e-12):.1f} dB")
    print(f"see {asked.out / 'pictures.png'}")


if __name__ == "__main__":
    main(parser().parse_args())
