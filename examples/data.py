"""Pictures in the Hugging Face layout: parquet files with columns `img` = {bytes, path}, `label`, perhaps `caption`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

DEFAULT_DATA = Path("../shared/data/cifar10")


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of one split, whether named `train.parquet` or `train-00000-of-00001.parquet`."""
    files = sorted(folder.rglob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"no {split}*.parquet under {folder}: point --data at a copy of the data")
    return files


def decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def load_split(folder: Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (n, 3, h, w) as uint8 and labels (n,) as int64, in the order of the files."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for file in parquet_files(Path(folder), split):
        table = pq.read_table(file, columns=["img", "label"])
        images += [decode(cell["bytes"]) for cell in table["img"][:limit].to_pylist()]
        labels += table["label"][:limit].to_pylist()
    pixels = torch.from_numpy(np.stack(images)[:limit]).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(labels[:limit])


def class_names(folder: Path) -> list[str]:
    """The names of the labels, as the files carry them; none where they do not."""
    metadata = pq.read_schema(parquet_files(Path(folder), "test")[0]).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return list(features.get("label", {}).get("names", []))


def load_captions(folder: Path, split: str) -> list[str]:
    """In the order of the files; none where there is no such column."""
    files = parquet_files(Path(folder), split)
    if "caption" not in pq.read_schema(files[0]).names:
        return []
    return [
        text for file in files for text in pq.read_table(file, columns=["caption"])["caption"].to_pylist()
    ]


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Endless shuffled batches in [-1, 1], flipped at random, channels last."""
    while True:
        for index in torch.randperm(len(images)).split(size):
            if len(index) == size:
                batch = random_flip(images[index]).float() / 127.5 - 1
                yield batch.to(memory_format=torch.channels_last)


def grid(images: list[Image.Image], columns: int = 8, zoom: int = 2) -> Image.Image:
    """The images row by row in one, each pixel enlarged to zoom x zoom."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
