"""The embedded model's pictures in float and quantized, the same seeds below each other: docs/pictures.png.

    python -m benchmarks.pictures --rows w8a8=ptq4dm,w4a8=mixdq,w4a4=quest --out docs/pictures.png

Artifacts that lie in --work already are drawn without being made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from stepquant.evaluate.metrics.pairs import psnr
from stepquant.job import Recipe, load, quantize_to

COLUMNS, STEPS, SIDE, GAP, MARGIN = 10, 50, 64, 4, 64
console = Console()


def draw(pipeline: Any) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(COLUMNS)]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(COLUMNS, generator=generators, num_inference_steps=STEPS).images


def decibels(images: list[Image.Image], reference: list[Image.Image]) -> float:
    """Mean PSNR over the pairs."""
    a, b = (torch.stack([pil_to_tensor(image) for image in row]) for row in (images, reference))
    return float(psnr(a, b).mean())


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).float() / 255


def sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """One row of pictures a model, its name before it."""
    width, height = MARGIN + COLUMNS * (SIDE + GAP), len(rows) * (SIDE + GAP)
    drawn, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(13)
    for row, (name, images) in enumerate(rows.items()):
        top = row * (SIDE + GAP)
        ImageDraw.Draw(drawn).multiline_text((2, top + 8), name, "black", font)
        for column, image in enumerate(images):
            enlarged = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            drawn.paste(enlarged, (MARGIN + column * (SIDE + GAP), top))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="stepquant:characters")
    parser.add_argument("--rows", default="w8a8=ptq4dm,w4a8=mixdq,w4a4=quest", help="SCHEME=METHOD,...")
    parser.add_argument("--work", type=Path, default=Path("runs/pictures"), help="folder of the artifacts")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures.png"))
    args = parser.parse_args()
    reference = draw(load(args.model))
    rows = {"float": reference}
    for row in args.rows.split(","):
        scheme, _, method = row.partition("=")
        folder = args.work / f"{method}-{scheme}"
        if not folder.is_dir():
            quantize_to(Recipe.of(model=args.model, method=method, scheme=scheme), folder, resume=True)
        images = draw(load(folder))
        rows[f"{scheme}\n{method}\n{decibels(images, reference):.1f} dB"] = images
        console.log(f"{method} {scheme}: {decibels(images, reference):.1f} dB to float")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(args.out, optimize=True)
    console.log(f"wrote {args.out}")


if __name__ == "__main__":
    main()
