"""Train an unconditional U-Net on the pixels of a data set, and export it as an ordinary `DDIMPipeline`.

    python examples/train_unet.py train --data ../shared/data/characters32 --run runs/characters
    python examples/train_unet.py export --run runs/characters --out characters

Ctrl-C or SIGTERM saves and stops; the same command goes on from there. To finish early, run it again with
a smaller `--images`: the learning rate then falls to zero over `--cooldown` images from where it stands.
With a larger `--images`, a finished run goes on at the full rate.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from data import DATA, DataError, draws, grid, load_pictures, pad_to, random_flip, signed
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from export import finish, load_average, train_and_export
from posterior import parts_of
from torch import Tensor, nn
from training import SCHEDULER, Loss, Trainer, add_arguments, compiled, main, run

CHANNELS = {"characters": (16, 32, 96, 128), "cifar10": (32, 64, 128, 256)}
CARD = """---
license: {license}
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {title}

An unconditional DDPM U-Net for {side}x{side} images: {millions:.1f} M parameters, channels {channels}, one layer a block,
attention at 8x8, v-prediction, 1000 linear-beta steps. An ordinary diffusers `DDIMPipeline`.

- Seen: {seen:,} images in {hours:.1f} hours{processor}.
- Last loss (of v, {target}): {loss:.4f}.

![{samples} samples of DDIM with 50 steps from consecutive seeds, not selected](samples.png)
"""


def unet_config(channels: tuple[int, ...], side: int) -> dict:
    levels = len(channels)
    attends = [level == 2 for level in range(levels)]
    return {
        "sample_size": side,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "down_block_types": tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        "up_block_types": tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        "attention_head_dim": 32,
        "norm_num_groups": 8 if channels[0] < 32 else 16,
    }


def prepare(unet: UNet2DModel) -> UNet2DModel:
    """Attention as plain products, whose gradient is faster over 64 tokens."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return unet


def sample(unet: UNet2DModel, count: int, steps: int = 50) -> list:
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    pipeline = DDIMPipeline(unet, DDIMScheduler(**SCHEDULER))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(count, generator=generators, num_inference_steps=steps).images


def show(networks: nn.ModuleDict, file: Path) -> None:
    grid(sample(networks["unet"], 16, 25), 8, 3).save(file)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    images = pad_to(load_pictures(args.data, "train").images, 8)
    unet = UNet2DModel(**unet_config(CHANNELS[args.size], images.shape[-1]))
    trainer, loss_of, order = Trainer({"unet": prepare(unet)}, args), Loss(), draws(len(images), args.batch)
    network = trainer.networks["unet"]
    if args.parts:
        if args.flip or args.device != "cpu":
            raise DataError("--parts takes images as they are, on the CPU: leave out --flip and --device")
        compositions, picked = parts_of(images, args.parts, args.run)
        trainer.state.target = "against means of what noise leaves open"
    model = compiled(network, args)

    def loss() -> Tensor:
        index = next(order)
        batch = images[index]
        mean = partial(compositions.mean, picked=picked[index]) if args.parts else None
        clean = signed(random_flip(batch) if args.flip else batch).to(args.device)
        return loss_of(lambda noisy, steps: model(noisy, steps, return_dict=False)[0], clean, mean)

    run(trainer, loss, show)


def export(args: argparse.Namespace) -> None:
    """The averaged weights as a pipeline folder in fp16, with its card and a grid of samples."""
    configs, weights, state = load_average(args.run)
    unet = UNet2DModel(**configs["unet"])
    unet.load_state_dict(weights["unet"])
    DDIMPipeline(unet.half(), DDIMScheduler(**SCHEDULER)).save_pretrained(args.out)
    channels = "-".join(map(str, unet.config.block_out_channels))
    finish(
        args,
        CARD,
        state,
        unet,
        sample(unet.float(), args.samples),
        side=unet.config.sample_size,
        channels=channels,
    )


def parser() -> argparse.ArgumentParser:
    parser, training, _ = train_and_export(
        __doc__, train, export, title="Characters U-Net", run=Path("runs/characters")
    )
    training.add_argument("--data", type=Path, default=DATA / "characters32", help="folder of parquet files")
    training.add_argument("--size", choices=sorted(CHANNELS), default="characters", help="the network's size")
    training.add_argument(
        "--parts",
        metavar="FILE",
        help="images are composed of these parts ('characters'): learn from means over them",
    )
    training.add_argument("--flip", action="store_true", help="mirror half of the images")
    training.add_argument("--compile", action="store_true", help="worth its minutes on a GPU")
    add_arguments(training, images=300_000, cooldown=150_000, lr=1e-3)
    return parser


if __name__ == "__main__":
    main(parser())
