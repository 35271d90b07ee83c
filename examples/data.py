"""Images in the Hugging Face layout: parquet files with columns `img` = {bytes, path}, `label` and maybe `caption`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

DATA = Path("../shared/data")
DEFAULT_DATA = DATA / "cifar10"


class DataError(Exception):
    """What a user can mend: a file that is not as the trainers need it."""


@dataclass(frozen=True)
class Pictures:
    """Images (n, 3, height, width) as uint8, labels (n,) as int64, captions if asked for, the names of the classes."""

    images: Tensor
    labels: Tensor
    captions: list[str]
    classes: list[str]


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of one split, whether named `train.parquet` or `train-00000-of-00001.parquet`."""
    files = sorted(Path(folder).rglob(f"{split}*.parquet"))
    if not files:
        raise DataError(
            f"no {split}*.parquet under {folder}: point --data at a folder in the Hugging Face layout"
        )
    return files


def decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def read_columns(file: Path, columns: list[str]) -> pa.Table:
    try:
        missing = sorted(set(columns) - set(pq.read_schema(file).names))
        if missing:
            raise DataError(
                f"{file} has no column {', '.join(missing)} (it has {', '.join(pq.read_schema(file).names)}): "
                "the Hugging Face layout has img = {bytes, path} and label, and caption for models of text"
            )
        return pq.read_table(file, columns=columns)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is no parquet file: {error}") from error


def decode_all(file: Path, cells: list[dict]) -> list[np.ndarray]:
    images = []
    for row, cell in enumerate(cells):
        try:
            images.append(decode(cell["bytes"]))
        except (UnidentifiedImageError, OSError, TypeError, KeyError) as error:
            raise DataError(f"{file}, row {row}: img holds no picture ({error})") from error
    return images


def names_in(schema: pa.Schema) -> list[str]:
    """The names of the labels, as the files carry them; none where they do not."""
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return list(told.get("info", {}).get("features", {}).get("label", {}).get("names", []))


def class_names(folder: Path) -> list[str]:
    return names_in(pq.read_schema(parquet_files(folder, "test")[0]))


def load_captions(folder: Path, split: str) -> list[str]:
    """In the order of the files; none where there is no such column."""
    files = parquet_files(folder, split)
    if "caption" not in pq.read_schema(files[0]).names:
        return []
    return [text for file in files for text in read_columns(file, ["caption"])["caption"].to_pylist()]


def load_pictures(folder: Path, split: str, limit: int | None = None, *, captions: bool = False) -> Pictures:
    """One split, in the order of the files."""
    columns = ["img", "label", *(["caption"] if captions else [])]
    images: list[np.ndarray] = []
    labels: list[int] = []
    texts: list[str] = []
    for file in parquet_files(folder, split):
        table = read_columns(file, columns)
        images += decode_all(file, table["img"][:limit].to_pylist())
        labels += table["label"][:limit].to_pylist()
        texts += table["caption"][:limit].to_pylist() if captions else []
    sizes = {image.shape for image in images}
    if len(sizes) != 1:
        found = ", ".join(f"{width}x{height}" for height, width, _ in sorted(sizes)[:4])
        raise DataError(
            f"the images of {folder} ({split}) have different sizes ({found}): resize them to one"
        )
    # Without names the labels count for themselves.
    numbers = [label for label in labels if label is not None]
    classes = names_in(table.schema) or [str(label) for label in range(max(numbers, default=-1) + 1)]
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < len(classes):
            raise DataError(f"{folder} ({split}), row {row}: label {label} is none of {len(classes)} classes")
    pixels = torch.from_numpy(np.stack(images)[:limit]).permute(0, 3, 1, 2).contiguous()
    return Pictures(pixels, torch.tensor(labels[:limit]), texts[:limit], classes)


def load_split(folder: Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (n, 3, height, width) as uint8 and labels (n,) as int64, in the order of the files."""
    pictures = load_pictures(folder, split, limit)
    return pictures.images, pictures.labels


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def pad_to(images: Tensor, multiple: int) -> Tensor:
    """Zeros around images whose sides a network cannot halve often enough: 28x28 becomes 32x32."""
    height, width = images.shape[-2:]
    rows, columns = -height % multiple, -width % multiple
    sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return torch.nn.functional.pad(images, sides)


def draws(count: int, size: int) -> Iterator[Tensor]:
    """Endless batches of indices, every image once in each round."""
    while True:
        for index in torch.randperm(count).split(size):
            if len(index) == size:
                yield index


def signed(images: Tensor) -> Tensor:
    """From bytes to [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def grid(images: list[Image.Image], columns: int = 8, zoom: int = 2) -> Image.Image:
    """The images row by row in one, each pixel enlarged to zoom x zoom."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
