"""What the exports of trained models share: the averaged weights of a run, the card, the grid of samples."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data import DataError, grid
from PIL import Image
from torch import Tensor, nn
from training import CHECKPOINT, State, console, read_checkpoint


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
