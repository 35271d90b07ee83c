"""A cache of features on disk; its key is the bytes of the images and the digest of the network."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepquant.calib.cache import atomically, cache_folder
from stepquant.core.digest import tensors_digest
from stepquant.evaluate.networks.reader import Reader, View

FORMAT = 1  # raised when the same network and images give other features, because of a change of code


def images_digest(images: Tensor) -> str:
    """SHA-256 over the shape and the bytes of images (n, 3, h, w) in [0, 1], as an 8-bit file holds them."""
    pixels = (images.detach().cpu() * 255).round().to(torch.uint8).contiguous()
    return hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class CachedReader:
    """Reads images that it has read before from disk. A file that is damaged is made again."""

    reader: Reader
    folder: Path = field(default_factory=lambda: cache_folder() / "features")

    @property
    def digest(self) -> str:
        return self.reader.digest

    @property
    def resize(self) -> str:
        return self.reader.resize

    @property
    def views(self) -> tuple[View, ...]:
        return self.reader.views

    def read(self, images: Tensor) -> dict[str, Tensor]:
        file = self.file(images)
        found = read_file(file)
        if found is not None and set(found) == {view.name for view in self.views}:
            return found
        made = {name: rows.contiguous() for name, rows in self.reader.read(images).items()}
        note = {"content": tensors_digest(made)}
        atomically(file, lambda temporary: save_file(made, temporary, metadata=note))
        return made

    def file(self, images: Tensor) -> Path:
        name = images_digest(images)
        return self.folder / f"{self.digest}-{FORMAT}" / name[:2] / f"{name}.safetensors"


def read_file(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file whose content is what was written; None where there is no such file."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            content = (stored.metadata() or {}).get("content")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None
    return tensors if tensors_digest(tensors) == content else None
