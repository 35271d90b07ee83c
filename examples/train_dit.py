"""Train a class-conditional diffusion transformer on latents, and export it as an ordinary `DiTPipeline`.

    python examples/train_dit.py train --data ../shared/data/characters32 --autoencoder runs/autoencoder --run runs/dit
    python examples/train_dit.py export --run runs/dit --autoencoder runs/autoencoder --out characters-dit

`--data ../shared/data/fashion` trains Fashion-MNIST, after an autoencoder of its own. Ctrl-C or SIGTERM saves and
stops; the same command goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import DataError, draws, grid, load_pictures, pad_to
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from export import add_latent_arguments, finish, load_average, train_and_export
from torch import Tensor, nn
from train_autoencoder import decode, latents_of
from training import SCHEDULER, Loss, Trainer, add_arguments, compiled, main, run

# DiTPipeline asks for class 1000 where it wants none.
NO_CLASS = 1000
LEFT_OUT = 0.1
GUIDANCE = 4.0  # as DiTPipeline has it
CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "patch_size": 2,
    "num_embeds_ada_norm": NO_CLASS,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
CARD = """---
license: {license}
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {title}

A class-conditional diffusion transformer for {side}x{side} images: {millions:.1f} M parameters, patches of 2x2 latents,
width 128 in heads of 32, six blocks, v-prediction, 1000 linear-beta steps, on the latents (4 channels, half the side) of
its own autoencoder. An ordinary diffusers `DiTPipeline`: `pipe(class_labels=[0, 12], guidance_scale={guidance})`.

- Seen: {seen:,} images in {hours:.1f} hours{processor}.
- Last loss (of v, {target}): {loss:.4f}.
- Classes: {classes}. Any other label gives a picture of no class in particular.

![{samples} samples of DDIM with 50 steps from consecutive seeds, the classes in turn, guidance {guidance}, not selected](samples.png)
"""


def build(side: int) -> DiTTransformer2DModel:
    """In evaluation mode: in training its blocks leave the class out one by one, which guidance never does."""
    model = DiTTransformer2DModel(**CONFIG, sample_size=side).eval()
    for name, parameter in model.named_parameters():
        # Blocks begin as identities (Peebles and Xie 2023, arXiv:2212.09748, section 3.2).
        if ".norm1.linear." in name or name.startswith("proj_out_2"):
            nn.init.zeros_(parameter)
        elif "embedding_table" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, guidance: float, steps: int) -> Tensor:
    """Scaled latents, one seed a picture, by DDIM."""
    scheduler, count = DDIMScheduler(**SCHEDULER), len(labels)
    scheduler.set_timesteps(steps)
    side = model.config.sample_size
    x = torch.stack(
        [torch.randn(4, side, side, generator=torch.Generator().manual_seed(n)) for n in range(count)]
    )
    asked = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    for t in scheduler.timesteps:
        with_class, without = model(
            torch.cat([x, x]), timestep=t.expand(2 * count), class_labels=asked
        ).sample.chunk(2)
        x = scheduler.step(without + guidance * (with_class - without), t, x).prev_sample
    return x


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pictures = load_pictures(args.data, "train")
    if len(pictures.classes) >= NO_CLASS:
        raise DataError(
            f"{args.data} has {len(pictures.classes)} classes: a DiTPipeline holds up to {NO_CLASS - 1}"
        )
    autoencoder, latents = latents_of(args.autoencoder, pad_to(pictures.images, 4))
    trainer = Trainer({"transformer": build(latents.shape[-1])}, args)
    loss_of, order = Loss(), draws(len(latents), args.batch)
    network, classes = trainer.networks["transformer"], len(pictures.classes)
    model = compiled(network, args)

    def loss() -> Tensor:
        index = next(order)
        labels = torch.where(torch.rand(len(index)) < LEFT_OUT, NO_CLASS, pictures.labels[index]).to(
            args.device
        )
        clean = latents[index].to(args.device)
        return loss_of(
            lambda noisy, t: model(noisy, timestep=t, class_labels=labels, return_dict=False)[0], clean
        )

    def show(networks: nn.ModuleDict, file: Path) -> None:
        drawn = sample(networks["transformer"].cpu(), torch.arange(16) % classes, GUIDANCE, 25)
        networks.to(args.device)
        grid(decode(autoencoder, drawn), 8, 3).save(file)

    run(trainer, loss, show)


def export(args: argparse.Namespace) -> None:
    """The averaged weights with their autoencoder as a pipeline folder in fp16, with its card and a grid of samples."""
    configs, weights, state = load_average(args.run)
    pictures = load_pictures(args.data, "train")
    classes, autoencoder = pictures.classes, latents_of(args.autoencoder, pad_to(pictures.images, 4))[0]
    model = DiTTransformer2DModel(**configs["transformer"])
    model.load_state_dict(weights["transformer"])
    with torch.no_grad():
        for table in (layer for layer in model.modules() if isinstance(layer, nn.Embedding)):
            table.weight[len(classes) : NO_CLASS] = table.weight[NO_CLASS]
    pipe = DiTPipeline(model.half(), autoencoder.half(), DDIMScheduler(**SCHEDULER))
    names = {str(index): name.replace("-", " ") for index, name in enumerate(classes)}
    # The pipeline reads the names of the classes but does not write them by itself.
    pipe.register_to_config(id2label=names)
    pipe.save_pretrained(args.out)
    labels = torch.arange(args.samples) % len(classes)
    images = decode(autoencoder.float(), sample(model.float().eval(), labels, args.guidance, 50))
    facts = {"side": pictures.images.shape[-1], "classes": ", ".join(classes), "guidance": args.guidance}
    finish(args, CARD, state, model, images, **facts)


def parser() -> argparse.ArgumentParser:
    parser, training, exporting = train_and_export(
        __doc__, train, export, title="Characters DiT", run=Path("runs/characters-dit")
    )
    training.add_argument("--compile", action="store_true", help="worth its minutes on a GPU")
    add_arguments(training, images=400_000, cooldown=200_000, lr=1e-3)
    add_latent_arguments(training, exporting, GUIDANCE)
    return parser


if __name__ == "__main__":
    main(parser())
