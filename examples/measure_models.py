"""What the pictures of a trained pipeline are worth: recognised, truth, and the Frechet distance, with its own floor.

    python examples/measure_models.py --pipeline FOLDER --data ../shared/data/characters32 --samples 1000

For any pipeline of these trainers: without condition, by class (the classes in turn), or by text (captions of the
test split). `--features` names the classifier's folder, `--no-truth` leaves out what only the characters have.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import DATA, grid, load_captions, load_split
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from PIL import Image
from rich.progress import track
from torch import Tensor
from training import console, main

from stepquant.evaluate.metrics.classifiers import Classifier, read_classifier
from stepquant.evaluate.metrics.frechet import Statistics, frechet
from stepquant.evaluate.metrics.parts import read_parts
from stepquant.evaluate.metrics.singles import wilson
from stepquant.evaluate.metrics.truth import BROKEN, Truth, psnr
from stepquant.models import zoo


def load(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.float()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked_of(pipe: Any, data: Path, count: int) -> Sequence[Any] | None:
    """Labels or prompts, one a picture; None where nothing is asked."""
    if isinstance(pipe, DiTPipeline):
        return [index % len(pipe.labels) for index in range(count)]
    if isinstance(pipe, StableDiffusionPipeline):
        captions = load_captions(data, "test")
        return [captions[index % len(captions)] for index in range(count)]
    return None


def draw(pipe: Any, asked: Sequence[Any] | None, args: argparse.Namespace) -> Tensor:
    """Pictures as bytes (n, 3, side, side), one seed each."""
    made = []
    for begin in track(range(0, args.samples, args.batch), "sampling", console=console):
        seeds = range(args.seed + begin, args.seed + min(begin + args.batch, args.samples))
        options: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
        if asked is None:
            options["batch_size"] = len(seeds)
        else:
            name = "class_labels" if isinstance(pipe, DiTPipeline) else "prompt"
            options[name] = list(asked[begin : begin + len(seeds)])
        if asked is not None and args.guidance is not None:
            options["guidance_scale"] = args.guidance
        made += pipe(num_inference_steps=args.steps, **options).images
    return torch.from_numpy(np.stack([np.asarray(image) for image in made])).permute(0, 3, 1, 2)


def features(classifier: Classifier, images: Tensor) -> Statistics:
    extractor = classifier.extractor()
    return Statistics.of(torch.cat([extractor(batch.float() / 255) for batch in images.split(500)]))


def report(images: Tensor, asked: Sequence[Any] | None, args: argparse.Namespace) -> None:
    classifier, count = read_classifier(args.features), len(images)
    test, train = (
        features(classifier, load_split(args.data, *part)[0]) for part in (("test",), ("train", count))
    )
    name = classifier.distance
    console.print(f"{name} to test: {frechet(features(classifier, images), test):.1f}, {count} pictures")
    console.print(f"{name} of as many training pictures to test: {frechet(train, test):.1f}")
    if asked is not None:
        hits = classifier.read(images.float() / 255, [str(one) for one in asked])
        low, high = wilson(int(hits.sum()), count)
        share = hits.float().mean()
        console.print(f"recognised as asked: {share:.1%} ({low:.1%} to {high:.1%})")
    if args.truth:
        decibels = psnr(Truth(read_parts()).read(images.float() / 255))
        broken = (decibels < BROKEN).float().mean()
        console.print(f"truth: {decibels.median():.1f} dB in the median, {broken:.1%} below {BROKEN:.0f} dB")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--features", type=Path, default=zoo.path("stepquant:characters-features"))
    parser.add_argument("--data", type=Path, default=DATA / "characters32", help="folder of parquet files")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="the pipeline's own, if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-truth", dest="truth", action="store_false")
    parser.add_argument("--grid", type=Path, help="write the first 64 pictures here")
    parser.set_defaults(command=measure)
    return parser


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pipe = load(args.pipeline)
    asked = asked_of(pipe, args.data, args.samples)
    began = time.monotonic()
    images = draw(pipe, asked, args)
    console.print(f"{args.samples} pictures in {(time.monotonic() - began) / 60:.1f} minutes")
    if args.grid:
        first = images[:64].permute(0, 2, 3, 1).numpy()
        grid([Image.fromarray(image) for image in first]).save(args.grid)
    report(images, asked, args)


if __name__ == "__main__":
    main(parser())
