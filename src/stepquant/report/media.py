"""Files of what pipelines make: grids of images, moving grids of videos, sounds one after the other."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stepquant.calib.cache import atomically
from stepquant.errors import StepquantError
from stepquant.report.images import grid, write_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOVING, SOUND = ".gif", ".wav"
NAMES = {3: "sounds", 4: "images", 5: "videos"}  # by the dimensions of what was made
ENDINGS = {3: (SOUND,), 4: IMAGE_SUFFIXES, 5: (MOVING, *IMAGE_SUFFIXES)}
FRAMES_PER_SECOND = 8
PAUSE = 0.5  # seconds between sounds
LOUDEST = 32767  # of 16 bits


def name_of(made: Tensor) -> str:
    return NAMES[made.ndim]


def file_for(made: Tensor, file: Path | None, stem: str = "grid") -> Path:
    """The file to write, which must suit what was made."""
    endings = ENDINGS[made.ndim]
    if file is None:
        return Path(stem + endings[0])
    if file.suffix.lower() not in endings:
        raise StepquantError(
            f"{name_of(made)} cannot be written as '{file.name}'",
            expected=f"a name that ends in {', '.join(endings)}",
            fix="give another --out",
        )
    return file


def write_media(batches: Sequence[Tensor], file: Path, rate: int = 0) -> Path:
    """Everything as one file, in the format of its name; `rate` is that of sounds, in samples a second."""
    made = torch.cat([batch.float().cpu() for batch in batches])
    if file.suffix.lower() == SOUND:
        atomically(file, lambda temporary: temporary.write_bytes(wav(made, rate)))
    elif file.suffix.lower() == MOVING:
        atomically(file, lambda temporary: temporary.write_bytes(gif(made)))
    else:
        write_image(sheet(made), file)
    return file


def sheet(made: Tensor) -> Image.Image:
    """A grid of images; of videos, a row of frames each."""
    return grid(made) if made.ndim == 4 else grid(made.flatten(0, 1), columns=made.shape[1])


def gif(videos: Tensor) -> bytes:
    """Videos (n, f, c, h, w) in one moving grid."""
    frames = [grid(frame) for frame in videos.unbind(1)]
    first, *others = [frame.convert("RGB") for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=1000 // FRAMES_PER_SECOND, loop=0)
    return buffer.getvalue()


def wav(sounds: Tensor, rate: int) -> bytes:
    """Sounds (n, c, samples), one after the other in 16 bits; louder ones than that are made softer together."""
    pause = torch.zeros(sounds.shape[1], int(PAUSE * rate))
    line = torch.cat([part for sound in sounds for part in (sound, pause)][:-1], 1)
    codes = (line / line.abs().max().clamp(min=1) * LOUDEST).round().to(torch.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(codes))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(codes.T.contiguous().numpy().tobytes())
    return buffer.getvalue()
