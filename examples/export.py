"""What the exports of trained models share: their commands, the averaged weights of a run, the card, the grid of samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from data import DATA, DataError, grid
from PIL import Image
from torch import Tensor, nn
from training import CHECKPOINT, State, console, read_checkpoint

Command: TypeAlias = Callable[[argparse.Namespace], None]


def train_and_export(
    doc: str | None, train: Command, export: Command, *, title: str, run: Path
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of a trainer with its two commands, and these; each has what all trainers have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training, exporting = commands.add_parser("train"), commands.add_parser("export")
    training.set_defaults(command=train)
    exporting.set_defaults(command=export)
    exporting.add_argument("--out", type=Path, required=True, help="the pipeline folder to write")
    exporting.add_argument("--samples", type=int, default=64, help="pictures of the grid")
    exporting.add_argument("--title", default=title)
    exporting.add_argument("--license", default="cc0-1.0")
    exporting.add_argument("--processor", default="", help="what it was trained on, for the card")
    for command in (training, exporting):
        command.add_argument("--run", type=Path, default=run, help="checkpoint's folder")
    return parser, training, exporting


def add_latent_arguments(
    training: argparse.ArgumentParser, exporting: argparse.ArgumentParser, guidance: float
) -> None:
    """What trainers on latents have besides: they read the data, through an autoencoder, for both commands."""
    exporting.add_argument("--guidance", type=float, default=guidance)
    for command in (training, exporting):
        command.add_argument(
            "--data", type=Path, default=DATA / "characters32", help="folder of parquet files"
        )
        command.add_argument("--autoencoder", type=Path, default=Path("runs/autoencoder"), help="its run")


def load_average(run: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], State]:
    """Configurations and averaged weights by network, and how long they were trained."""
    if not (run / CHECKPOINT).is_file():
        raise DataError(f"{run} holds no {CHECKPOINT}: train first, or say where with --run")
    groups, configs, state = read_checkpoint(run / CHECKPOINT)
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in configs}
    for key, value in groups["ema"].items():
        network, name = key.split(".", 1)
        weights[network][name] = value
    return configs, weights, state


def finish(
    args: argparse.Namespace,
    card: str,
    state: State,
    denoiser: nn.Module,
    images: list[Image.Image],
    **facts: object,
) -> None:
    """The card and the grid beside the pipeline that was saved."""
    grid(images).save(args.out / "samples.png", optimize=True)
    for weights in args.out.rglob("*.safetensors"):
        weights.chmod(0o644)
    millions = sum(weight.numel() for weight in denoiser.parameters()) / 1e6
    text = card.format(
        title=args.title,
        license=args.license,
        processor=f" on {args.processor}" if args.processor else "",
        millions=millions,
        samples=len(images),
        hours=state.seconds / 3600,
        **asdict(state),
        **facts,
    )
    (args.out / "README.md").write_text(text)
    console.log(f"wrote {args.out}")
