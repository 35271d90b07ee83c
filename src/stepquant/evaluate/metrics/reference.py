"""The data that generated images are compared with: shipped statistics, a file of statistics, or a folder of images."""

from __future__ import annotations

import hashlib
import platform
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepquant.core.digest import value_digest
from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.classifiers import SHIPPED
from stepquant.evaluate.metrics.frechet import Statistics, frechet
from stepquant.evaluate.metrics.measure import Sets
from stepquant.evaluate.metrics.sets import Target
from stepquant.evaluate.networks.inception import SPATIAL_WIDTH, WIDTH
from stepquant.evaluate.networks.reader import Reader
from stepquant.models import zoo

SAMPLED = 256  # files of a folder of images whose bytes count in its digest
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Names of mean and covariance in the statistics files that evaluators pass on, and their width, by view.
MOMENTS = {"FID": ("mu", "sigma", WIDTH), "sFID": ("mu_s", "sigma_s", SPATIAL_WIDTH)}


def read_data(
    source: str | None, reader: Reader, size: tuple[int, int] | None = None
) -> Mapping[str, Target]:
    """What each view of the reader is compared with; views of which the data say nothing are left out.

    source: `characters` or `cifar10` for the shipped statistics of its test split, a folder of images, or an .npz file with `mu` and
    `sigma` (and `mu_s` and `sigma_s`).
    size: height and width of the images that will be compared; a folder of images of another size is an error.
    """
    if source is None:
        raise EvaluationError(
            "say what the model was trained on",
            expected=f"--data FOLDER of images, a file of statistics, or {' or '.join(SHIPPED)}",
        )
    if source in SHIPPED:
        return shipped(reader, source)
    if is_statistics(source):
        return read_moments(Path(source), reader)
    return from_folder(Path(source), reader, size)


def is_statistics(source: str) -> bool:
    return Path(source).suffix == ".npz"


def data_digest(source: str) -> str:
    """Of a file of statistics by its bytes; of a folder of images, which may be large, by all names and sizes and by
    the bytes of some."""
    if is_statistics(source):
        return file_digest(Path(source))
    files = image_files(Path(source))
    sizes = [[str(file.relative_to(source)), file.stat().st_size] for file in files]
    return value_digest([sizes, [file_digest(file) for file in files[:SAMPLED]]])


def file_digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise EvaluationError(f"cannot read the file: {error}", where=str(file)) from error


def sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def shipped(reader: Reader, source: str) -> dict[str, Target]:
    known = SHIPPED[source]
    if known.distance not in {view.name for view in reader.views}:
        return {}
    splits = read_reference(reader, zoo.path(known.classifier) / REFERENCE_NAME)
    test = splits["test"]
    floor = frechet(splits["train"].statistics, test.statistics)
    note = f"the train split itself is at {floor:.2f}; falls with n"
    return {known.distance: Target(known.label, (test.statistics,), test.features, note)}


def from_folder(folder: Path, reader: Reader, size: tuple[int, int] | None) -> dict[str, Target]:
    """Streams over the images: memory does not grow with their number."""
    found = {view.name: Sets(view, reader.digest, reader.resize) for view in reader.views if not view.classes}
    count = 0
    for images in folder_images(folder):
        if size is not None and tuple(images.shape[2:]) != tuple(size):
            raise EvaluationError(
                "the data have another size than the generated images",
                where=str(folder),
                got=f"{images.shape[3]}x{images.shape[2]}",
                expected=f"{size[1]}x{size[0]}",
                fix="make a copy of the data in that size, as the model was trained on it",
            )
        count += len(images)
        for name, rows in reader.read(images).items():
            if name in found:
                found[name] = found[name].add("data", rows)
    label, note = f"images in {folder.name}", f"{count} real images; falls with n"
    return {
        name: Target(label, sets.sums["data"], sets.features.get("data"), note)
        for name, sets in found.items()
    }


def read_moments(file: Path, reader: Reader) -> dict[str, Target]:
    """Mean and covariance of every view that the file knows; nothing in it is unpickled."""
    wanted = {view.name: MOMENTS[view.name] for view in reader.views if view.name in MOMENTS}
    try:
        with np.load(file, allow_pickle=False) as stored:
            tensors = {
                name: torch.from_numpy(stored[name].astype(np.float64, casting="same_kind"))
                for *pair, _ in wanted.values()
                for name in pair
                if name in stored.files
            }
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"cannot read the statistics: {error}",
            where=str(file),
            expected="an .npz file with mu and sigma, as FID evaluators write it",
        ) from error
    if wanted and not any(pair[0] in tensors for pair in wanted.values()):
        raise EvaluationError(
            "the file holds no statistics",
            where=str(file),
            expected="arrays mu and sigma, or mu_s and sigma_s",
        )
    return {
        name: moments_target(file, tensors[mean], tensors.get(covariance), width)
        for name, (mean, covariance, width) in wanted.items()
        if mean in tensors
    }


def moments_target(file: Path, mean: Tensor, covariance: Tensor | None, width: int) -> Target:
    if mean.shape != (width,) or covariance is None or covariance.shape != (width, width):
        raise EvaluationError(
            "these are not the mean and covariance of the network's features",
            where=str(file),
            got=f"{tuple(mean.shape)} and {None if covariance is None else tuple(covariance.shape)}",
            expected=f"{(width,)} and {(width, width)}",
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise EvaluationError("the statistics are not finite", where=str(file), fix="make them anew")
    # The distance needs the moments alone; how many images they stand for is not in the file.
    blocks = (Statistics.from_moments(2, mean, covariance),)
    return Target(
        f"statistics in {file.name}", blocks, None, "by whose network they were made, the file does not say"
    )


def check_data(data: str | None) -> None:
    """Before anything slow begins: a place that does not exist is an error."""
    if data is not None and data not in SHIPPED and not Path(data).exists():
        image_files(Path(data))


def folder_images(folder: Path, batch: int = 256) -> Iterator[Tensor]:
    """Batches (n, 3, h, w) in [0, 1] of the images in a folder."""
    files = image_files(folder)
    size = read_image(files[0], None).shape[1:]
    for start in range(0, len(files), batch):
        yield torch.stack([read_image(file, size) for file in files[start : start + batch]])


def image_files(folder: Path) -> list[Path]:
    """In an order drawn by their names, so that the first thousands are of every class and not of the first alone; a
    folder without any is an error."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(found, key=lambda file: sha256(file.relative_to(folder).as_posix()))
    if files:
        return files
    raise EvaluationError(
        "no images to compare with",
        where=str(folder),
        got="nothing of that kind" if folder.is_dir() else f"no such folder on {platform.node()}",
        expected=f"a folder with {', '.join(IMAGE_SUFFIXES)}, a file of statistics (.npz), or {' or '.join(SHIPPED)}",
    )


def read_image(file: Path, size: torch.Size | None) -> Tensor:
    """An image (3, h, w) in [0, 1], which must have this height and width."""
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"cannot read the image: {error}", where=str(file)) from error
    found = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    if size is not None and found.shape[1:] != size:
        raise EvaluationError(
            "images differ in size",
            where=str(file),
            got=tuple(found.shape[1:]),
            expected=f"{tuple(size)} as the first one",
        )
    return found


REFERENCE_NAME = "reference.safetensors"


@dataclass(frozen=True)
class Split:
    """Sums over all images of a split of real data, and the features of a few of them."""

    statistics: Statistics
    features: Tensor | None = None


def to_tensors(splits: Mapping[str, Split]) -> dict[str, Tensor]:
    """Mean, covariance and count of each split in fp32, features in fp16, as they are stored."""
    out: dict[str, Tensor] = {}
    for name, split in splits.items():
        found = split.statistics
        out |= {
            f"{name}.mean": found.mean.float(),
            f"{name}.covariance": found.covariance.float().contiguous(),
        }
        out[f"{name}.count"] = torch.tensor([found.count])
        if split.features is not None:
            out[f"{name}.features"] = split.features.half().contiguous()
    return out


def read_reference(extractor: Reader, file: Path) -> dict[str, Split]:
    """Stored splits by name; they must have been made by this very extractor."""
    try:
        with safe_open(file, "pt") as stored:
            digest = (stored.metadata() or {}).get("extractor", "none")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"the reference statistics cannot be read: {error}", where=str(file)) from error
    if digest != extractor.digest:
        raise EvaluationError(
            "the reference statistics were made by another extractor",
            where=str(file),
            got=digest,
            expected=extractor.digest,
            fix="make them again: examples/make_reference_statistics.py",
        )
    return {name: to_split(name, tensors) for name in sorted({key.partition(".")[0] for key in tensors})}


def to_split(name: str, tensors: Mapping[str, Tensor]) -> Split:
    count = int(tensors[f"{name}.count"])
    features = tensors.get(f"{name}.features")
    return Split(
        Statistics.from_moments(count, tensors[f"{name}.mean"], tensors[f"{name}.covariance"]),
        None if features is None else features.float(),
    )
