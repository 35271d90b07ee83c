"""FD-C10 of a CIFAR-10 pipeline: the Frechet distance of its samples to the test split, with its noise floor.

    python examples/measure_models.py --pipeline FOLDER --features FOLDER --data FOLDER --samples 2048

The features are those of the small classifier that `train_features.py` trains. This is no FID: numbers
compare only with other FD-C10 of the same features, number of samples and copy of the data.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from data import DEFAULT_DATA, load_split
from diffusers import DDIMPipeline
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from stepquant.evaluate.networks.classifier import FeatureNet, load_feature_net

console = Console()


def fd_c10(net: FeatureNet, reference: Tensor, images: Tensor) -> float:
    """Frechet distance between two sets of uint8 images, in the features of `net`."""
    distance = FrechetInceptionDistance(feature=net, normalize=True)
    for pixels, real in ((reference, True), (images, False)):
        for batch in pixels.split(500):
            distance.update(batch.float() / 255, real=real)
    return float(distance.compute())


def draw(pipeline: DDIMPipeline, count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Batches of uint8 samples; the network runs in bf16, the sampler in float32."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(0, count, batch):
        with torch.autocast("cpu", torch.bfloat16):
            images = pipeline(
                batch_size=batch, generator=generator, num_inference_steps=steps, output_type="np"
            ).images
        yield torch.from_numpy(images).mul(255).round().byte().permute(0, 3, 1, 2)


def sample(args: argparse.Namespace) -> Tensor:
    pipeline = DDIMPipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    if args.compile:
        pipeline.unet.compile()
    drawn = draw(pipeline, args.samples, args.batch, args.steps, args.seed)
    rounds = -(-args.samples // args.batch)
    return torch.cat(list(track(drawn, "sampling", total=rounds, console=console)))[: args.samples]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of a DDIMPipeline")
    parser.add_argument("--features", type=Path, required=True, help="folder of a FeatureNet")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of parquet files")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = load_feature_net(args.features)
    test, _ = load_split(args.data, "test")
    train, _ = load_split(args.data, "train", args.samples)
    console.print(
        f"FD-C10 of {args.samples} training images to the test split: {fd_c10(net, test, train):.3f}"
    )
    began = time.monotonic()
    images = sample(args)
    minutes = (time.monotonic() - began) / 60
    console.print(f"FD-C10 of {args.samples} DDIM-{args.steps} samples: {fd_c10(net, test, images):.3f}")
    console.print(f"(seed {args.seed}, sampled in {minutes:.1f} minutes)")


if __name__ == "__main__":
    main()
