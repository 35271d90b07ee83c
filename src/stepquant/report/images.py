"""Image grids: many images as one, tiny ones enlarged without blur."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepquant.calib.cache import atomically

# Enlarged until the shorter side of an image is at least this many pixels.
COMFORTABLE = 96
MID_GREY = 0.5
GAINS = (1, 2, 4, 8, 16, 32, 64)


def grid(images: Tensor, columns: int | None = None, scale: int | None = None, gap: int = 1) -> Image.Image:
    """Images (n, 3, h, w) in [0, 1] row by row, `gap` pixels of their own apart; by default as square as can be."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"a grid needs images (n, channels, h, w), got {tuple(images.shape)}")
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images.float().cpu().clamp(0, 1)):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return enlarge(to_image(sheet), scale or max(1, math.ceil(COMFORTABLE / min(height, width))))


def to_image(pixels: Tensor) -> Image.Image:
    """An image (3 or 1, h, w) in [0, 1] as 8 bits."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def write_grid(batches: Sequence[Tensor], file: Path, columns: int | None = None) -> Path:
    """All images of some batches as one file, in the format of its name."""
    write_image(grid(torch.cat([batch.float().cpu() for batch in batches]), columns), Path(file))
    return Path(file)


def write_image(image: Image.Image, file: Path) -> None:
    """In the format of its name, whole or not at all."""
    buffer = io.BytesIO()  # its encoder would not say why a disk takes no more
    image.save(buffer, format=Image.registered_extensions()[file.suffix.lower()])
    atomically(file, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def decode(images: Sequence[str]) -> Tensor:
    """PNGs in base64 as a tensor (n, 3, h, w) in [0, 1]."""
    arrays = [np.array(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def amplified(images: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """The difference around mid-grey, and the power of two it was multiplied by so that few pixels clip."""
    difference = images - target
    large = (
        float(difference.abs().flatten().quantile(0.99))
        if difference.numel() < 2**24
        else float(difference.abs().max())
    )
    gain = max((gain for gain in GAINS if gain * large <= MID_GREY), default=1)
    return (MID_GREY + gain * difference).clamp(0, 1), gain
