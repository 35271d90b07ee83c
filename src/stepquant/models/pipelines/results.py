"""What a pipeline returns, as one tensor: images (n, c, h, w), videos (n, f, c, h, w), sounds (n, c, samples)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepquant.errors import ModelError
from stepquant.models.pipelines.modular import is_modular, outputs_of

SOUNDS, IMAGES, VIDEOS = 3, 4, 5  # dimensions of each
# What pipelines call them; modular ones say `videos`.
OUTPUTS = {"audios": SOUNDS, "images": IMAGES, "frames": VIDEOS, "videos": VIDEOS}


def tensor_of(out: Any) -> Tensor:
    """Images and videos in [0, 1], sounds as the pipeline has them."""
    for name, dimensions in OUTPUTS.items():
        found = getattr(out, name, None)
        if found is not None:
            made = (sounds if dimensions == SOUNDS else pictures)(found).float()
            if made.ndim != dimensions:
                raise ModelError(
                    f"the pipeline returned {name} in an unknown layout",
                    got=tuple(made.shape),
                    expected=f"{dimensions} dimensions",
                )
            return made
    raise ModelError(
        "the pipeline returned nothing that can be compared",
        got=type(out).__name__,
        expected="images, frames or audios",
    )


def output_name(dimensions: int, pipeline: Any) -> str:
    """What a pipeline calls results of so many dimensions."""
    known = outputs_of(pipeline) if is_modular(pipeline) else set(OUTPUTS)
    return next(name for name, number in OUTPUTS.items() if number == dimensions and name in known)


def pictures(found: Any) -> Tensor:
    """Arrays have their channels last, tensors before the height; both may come in lists, one for each result."""
    if isinstance(found, Image.Image):
        return pictures(np.asarray(found.convert("RGB"), dtype=np.float32) / 255)
    if isinstance(found, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(found)).movedim(-1, -3)
    if isinstance(found, Tensor):
        return found
    return torch.stack([pictures(one) for one in found])


def sounds(found: Any) -> Tensor:
    """One channel where there is no axis for them."""
    if isinstance(found, list | tuple):
        found = np.stack([np.asarray(one) for one in found])
    made = torch.as_tensor(found)
    return made.unsqueeze(1) if made.ndim == SOUNDS - 1 else made


def sampling_rate(pipeline: Any) -> int:
    """Samples of a second of sound, as the part says that makes them."""
    for part in pipeline.components.values():
        settings = getattr(part, "config", None)
        for name in ("sampling_rate", "sample_rate"):
            rate = getattr(settings, name, None)
            if isinstance(rate, int):
                return rate
    raise ModelError("no part of the pipeline says how many samples of sound make a second")
