"""Methods against each other on one model, in Python: the same records, the same seeds, one table.

    python examples/compare_methods.py --methods minmax,ptq4dm,gptq --schemes w8a8,w4a8 --out runs/methods

For more than a look use `stepquant compare`: it survives interruptions, repeats over seeds, draws a page, and answers SQL.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stepquant as sq


def draw(pipe: Any, images: int, steps: int) -> np.ndarray:
    """Pictures of the same seeds, whatever the pipeline has become."""
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(seed) for seed in range(images)]
    return pipe(batch_size=images, generator=noise, num_inference_steps=steps, output_type="np").images


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="stepquant:characters", help="an unconditional pipeline")
    made.add_argument("--methods", default="minmax,ptq4dm,gptq", help="see `stepquant methods`")
    made.add_argument("--schemes", default="w8a8,w4a8", help="see `stepquant schemes`")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--samples", type=int, default=64, help="calibration records of every method")
    made.add_argument("--images", type=int, default=16)
    made.add_argument("--out", type=Path, default=Path("runs/methods"))
    return made


def main(asked: argparse.Namespace) -> None:
    steps = asked.steps
    wanted = draw(sq.load(asked.model), asked.images, steps)
    print(f"{'method':<16}{'scheme':<8}{'PSNR to float':>14}{'MB':>8}{'seconds':>9}")
    for scheme in asked.schemes.split(","):
        for method in asked.methods.split(","):
            pipe, began = sq.load(asked.model), time.perf_counter()
            sq.quantize(pipe, method=method, scheme=scheme, samples=asked.samples, steps=steps)
            took, folder = time.perf_counter() - began, asked.out / f"{method}-{scheme}"
            pipe.save_pretrained(folder)
            error = np.square(draw(pipe, asked.images, steps) - wanted).mean()
            decibels = -10 * np.log10(error + 1e-12)
            print(f"{method:<16}{scheme:<8}{decibels:>11.1f} dB{megabytes(folder):>8.2f}{took:>9.1f}")


if __name__ == "__main__":
    main(parser().parse_args())
