"""The data that generated images are compared with: shipped statistics, or a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.features import Extractor, Statistics, frechet, merge, read_reference
from stepquant.evaluate.metrics import MOST_FEATURES
from stepquant.evaluate.sets import Target

CIFAR10 = "cifar10"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_data(source: str | None, extractor: Extractor) -> Target:
    """`cifar10` for the shipped statistics of its test split, or a folder of images of the extractor's size."""
    if source is None:
        raise EvaluationError("say what the model was trained on: data='cifar10', or a folder of images")
    if source == CIFAR10:
        splits = read_reference(extractor)
        test = splits["test"]
        floor = frechet(splits["train"].statistics, test.statistics)
        note = f"the train split itself is at {floor:.2f}; falls with n"
        return Target("CIFAR-10 test", (test.statistics,), test.features, note)
    features = [extractor(batch) for batch in folder_images(Path(source))]
    statistics = merge([Statistics.of(part) for part in features])
    label = f"images in {Path(source).name}"
    kept = torch.cat(features)[:MOST_FEATURES]
    return Target(label, (statistics,), kept, f"{statistics.count} real images; falls with n")


def folder_images(folder: Path, batch: int = 256) -> Iterator[Tensor]:
    """Batches (n, 3, h, w) in [0, 1] of the images in a folder, in the order of their names."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        expected = f"a folder with {', '.join(IMAGE_SUFFIXES)}, or '{CIFAR10}'"
        raise EvaluationError("no images to compare with", where=str(folder), expected=expected)
    size = Image.open(files[0]).size
    for start in range(0, len(files), batch):
        yield torch.stack([read_image(file, size) for file in files[start : start + batch]])


def read_image(file: Path, size: tuple[int, int]) -> Tensor:
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise EvaluationError(f"cannot read the image: {error}", where=str(file)) from error
    if pixels.shape[1::-1] != size:
        raise EvaluationError(
            "images differ in size",
            where=str(file),
            got=pixels.shape[1::-1],
            expected=f"{size} as the first one",
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
