"""Calibration records that do not come from the denoising process: for ablations only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stepquant.calib.cache import atomically
from stepquant.calib.calibset import CalibSet, written_form
from stepquant.calib.form import Parts
from stepquant.calib.record import FORMAT, Source, trajectory_seed
from stepquant.core.digest import tensors_digest
from stepquant.errors import CalibrationError
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import scheduler_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def from_noise(source: Source, steps: Tensor) -> CalibSet:
    """Pure Gaussian noise, whatever the step says."""
    return stored(source, gaussian(source, len(steps)), steps, "noise")


def from_images(source: Source, steps: Tensor, folder: str | None, *, diffused: bool) -> CalibSet:
    """Images of a folder, clean or with the noise of their step as in training, q(x_t | x_0)."""
    images = read_images(folder, Denoiser.of(source.pipeline).shape[1:], len(steps))
    if not diffused:
        return stored(source, images, steps, "images")
    scheduler = scheduler_of(source.pipeline, source.sampling.sampler, source.sampling.steps)
    noisy = scheduler.add_noise(images, gaussian(source, len(steps)), scheduler.timesteps[steps])
    return stored(source, noisy, steps, "diffused")


def gaussian(source: Source, count: int) -> Tensor:
    shape = Denoiser.of(source.pipeline).shape
    seeds = (trajectory_seed(source.seed, i) for i in range(count))
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def stored(source: Source, x: Tensor, steps: Tensor, kind: str) -> CalibSet:
    denoiser = Denoiser.of(source.pipeline)
    scheduler = scheduler_of(source.pipeline, source.sampling.sampler, source.sampling.steps)
    family = denoiser.family
    arguments = {family.x: x.contiguous(), family.t: scheduler.timesteps[steps].contiguous()}
    columns = arguments | {
        "step": steps.contiguous(),
        "trajectory": torch.arange(len(steps)),
        "branch": torch.zeros(len(steps), dtype=torch.long),
    }
    shard = source.cache / f"{kind}-{FORMAT}-{tensors_digest(columns)[:32]}" / "00000.safetensors"
    if not shard.exists():
        form = written_form(Parts.of(arguments, family).form)
        atomically(shard, lambda temporary: save_file(columns, temporary, form))
    rows = tuple((0, row) for row in range(len(steps)))
    return CalibSet((shard,), rows, family.x, family.t, {"kind": kind, "steps": source.sampling.steps})


def read_images(folder: str | None, size: tuple[int, int], count: int) -> Tensor:
    """`count` images of a folder in [-1, 1], in order of their names, again from the start when they run out."""
    files: Sequence[Path] = ()
    if folder is not None and Path(folder).is_dir():
        files = sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise CalibrationError(
            "no calibration images",
            where=folder,
            expected=f"a folder with {', '.join(SUFFIXES)} files",
            fix="--set images=FOLDER",
        )
    height, width = size
    chosen = [files[i % len(files)] for i in range(count)]
    images = (Image.open(file).convert("RGB").resize((width, height)) for file in chosen)
    arrays = [np.asarray(image, dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
