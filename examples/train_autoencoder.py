"""Train the small autoencoder behind the latent models: 2x down, 4 channels, an `AutoencoderKL`.

    python examples/train_autoencoder.py train --data ../shared/data/characters32 --run runs/autoencoder

Ctrl-C or SIGTERM saves and stops; the same command goes on from there. The trainers of latent models read the
averaged weights from the run's checkpoint by `--autoencoder RUN`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import DATA, DataError, draws, grid, load_pictures, pad_to, random_flip, signed
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from export import load_average
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import Trainer, add_arguments, main, run

from stepquant.calib.cache import atomically
from stepquant.core.digest import tensors_digest, value_digest

CONFIG = {
    "sample_size": 32,
    "latent_channels": 4,
    "block_out_channels": (16, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
# A weak pull of the latents to a normal distribution; they are scaled to unit deviation afterwards.
DIVERGENCE = 1e-4
SHOWN = 32


def loss_of(autoencoder: nn.Module, clean: Tensor) -> Tensor:
    """Absolute and squared error of the picture, and the divergence of the latents from a normal distribution."""
    posterior = autoencoder.encode(clean).latent_dist
    error = autoencoder.decode(posterior.sample()).sample - clean
    return error.abs().mean() + error.square().mean() + DIVERGENCE * posterior.kl().mean() / clean[0].numel()


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor, size: int = 500) -> Tensor:
    """The means of the latents of all images, unscaled."""
    batches = [autoencoder.encode(signed(batch)).latent_dist.mean for batch in images.split(size)]
    return torch.cat(batches)


def load_autoencoder(run: Path) -> AutoencoderKL:
    """From a run's checkpoint, or from the folder of a pipeline or of an autoencoder."""
    if (run / "vae").is_dir() or (run / "config.json").is_file():
        return AutoencoderKL.from_pretrained(run, subfolder="vae" if (run / "vae").is_dir() else None).float()
    configs, weights, _ = load_average(run)
    if "vae" not in weights:
        raise DataError(f"{run} is no run of train_autoencoder.py: give its folder with --autoencoder")
    autoencoder = AutoencoderKL(**configs["vae"])
    autoencoder.load_state_dict(weights["vae"])
    return autoencoder.eval().requires_grad_(False)


def latents_of(run: Path, images: Tensor) -> tuple[AutoencoderKL, Tensor]:
    """The autoencoder with its scale set so that these images' latents have unit deviation, and the scaled latents."""
    autoencoder = load_autoencoder(run)
    latents = encode_once(run, autoencoder, images)
    scale = round(1 / latents.std().item(), 5)
    autoencoder.register_to_config(scaling_factor=scale)
    return autoencoder, latents * scale


def encode_once(run: Path, autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """The latents of these images, kept in half precision beside the autoencoder: encoding takes minutes."""
    key = value_digest([tensors_digest(autoencoder.state_dict()), tensors_digest({"images": images})])
    file = run / f"latents-{key[:16]}.safetensors"
    if not file.is_file():
        latents = {"latents": encode(autoencoder, images).half().contiguous()}
        atomically(file, lambda temporary: save_file(latents, temporary))
    return load_file(file)["latents"].float()


def decode(autoencoder: nn.Module, latents: Tensor) -> list:
    """Pictures of scaled latents."""
    with torch.no_grad():
        images = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample
    return VaeImageProcessor().postprocess(images, output_type="pil")


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    images = pad_to(load_pictures(args.data, "train").images, 2)
    config = CONFIG | {"sample_size": images.shape[-1]}
    trainer, order = Trainer({"vae": AutoencoderKL(**config)}, args), draws(len(images), args.batch)
    shown = signed(pad_to(load_pictures(args.data, "test", SHOWN).images, 2))

    def loss() -> Tensor:
        batch = images[next(order)]
        clean = signed(random_flip(batch) if args.flip else batch).to(args.device)
        return loss_of(trainer.networks["vae"], clean)

    def show(networks: nn.ModuleDict, file: Path) -> None:
        with torch.no_grad():
            back = networks["vae"](shown.to(args.device)).sample
        error = (back.clamp(-1, 1).cpu() - shown).square().mean((1, 2, 3)) / 4
        print(f"PSNR of {SHOWN} test images: {-10 * error.log10().mean():.1f} dB", flush=True)
        pairs = torch.stack([shown, back.cpu()]).unflatten(1, (-1, 8)).transpose(0, 1).flatten(0, 2)
        grid(VaeImageProcessor().postprocess(pairs, output_type="pil"), 8, 3).save(file)

    run(trainer, loss, show)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.set_defaults(command=train)
    training.add_argument("--data", type=Path, default=DATA / "characters32", help="folder of parquet files")
    training.add_argument("--run", type=Path, default=Path("runs/autoencoder"), help="checkpoint's folder")
    training.add_argument("--flip", action="store_true", help="mirror half of the images")
    add_arguments(training, images=60_000, cooldown=60_000, lr=2e-3)
    return parser


if __name__ == "__main__":
    main(parser())
