"""Calls as users write them, in a file of JSON lines or in Python: paths of pictures and tensors are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.models.call import STEPS, Call

MOVING, TENSORS = ".gif", ".safetensors"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", MOVING)
SEEN = (
    "image",
    "mask",
    "video",
    "frame",
)  # arguments with such names hold pictures, whatever the file is called
EXAMPLE = '{"prompt": "a red hat", "image": "hat.png", "mask_image": "mask.png"}'


def read_calls(file: Path) -> tuple[Call, ...]:
    """One call a line; relative paths start at the folder of the file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(
            f"cannot read the calls: {error}", expected="a text file with a line of JSON for each call"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"{file.name}, line {number}"
            found.append(written_call(parsed(line, origin), origin, file.parent))
    if not found:
        raise StepquantError("the file of calls is empty", where=str(file), expected=f"lines as {EXAMPLE}")
    return tuple(found)


def parsed(line: str, origin: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StepquantError(
            f"a call is no JSON: {error}", where=origin, got=line[:80], expected=EXAMPLE
        ) from error
    if not isinstance(value, dict):
        raise StepquantError(
            "a call must be a table of arguments", where=origin, got=line[:80], expected=EXAMPLE
        )
    return value


def written_calls(calls: Sequence[Mapping[str, Any] | Call]) -> tuple[Call, ...]:
    """Calls in Python; relative paths start at the working directory."""
    return tuple(
        one if isinstance(one, Call) else written_call(one, f"call {place}", Path())
        for place, one in enumerate(calls, 1)
    )


def written_call(arguments: Mapping[str, Any], origin: str, folder: Path) -> Call:
    read = {}
    for name, value in arguments.items():
        where = f"{origin}, argument '{name}'"
        try:
            read[name] = checked(name, read_value(name, value, folder), where)
        except (OSError, UnidentifiedImageError, SafetensorError, Image.DecompressionBombError) as error:
            words = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise StepquantError(
                f"cannot read a file of a call: {words}", where=where, got=str(value)[:200]
            ) from error
    try:
        return Call.of(read, origin)
    except StepquantError as error:
        raise StepquantError(error.what, where=origin, got=error.got, expected=error.expected) from error


def read_value(name: str, value: Any, folder: Path) -> Any:
    """A value with what stands in the files that it names."""
    if isinstance(value, list | tuple):
        return [read_value(name, one, folder) for one in value]
    if not isinstance(value, str | os.PathLike):
        return value
    suffix = Path(value).suffix.lower()
    if isinstance(value, str) and is_text(name):
        return value
    if suffix == TENSORS:
        return read_tensor(name, folder / value)
    if suffix in PICTURES or any(word in name for word in SEEN):
        return read_picture(folder / value)
    return value


def is_text(name: str) -> bool:
    """`prompt`, `negative_prompt_2`; not `prompt_embeds`."""
    return name.rstrip("_0123456789").endswith("prompt")


def read_picture(file: Path) -> Image.Image | list[Image.Image]:
    """One picture, or those of a file that moves."""
    with Image.open(file) as opened:
        if file.suffix.lower() == MOVING:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
        opened.load()
        return opened.copy() if opened.mode in ("RGB", "L", "RGBA") else opened.convert("RGB")


def read_tensor(name: str, file: Path) -> Tensor:
    """The tensor of that name, or the only one."""
    tensors = load_file(file)
    if name in tensors:
        return tensors[name]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise SafetensorError(f"it holds {', '.join(sorted(tensors)[:5]) or 'nothing'}, and none called '{name}'")


def checked(name: str, value: Any, where: str) -> Any:
    """A value that makes one result, and numbers that are numbers."""
    if isinstance(value, Tensor) and (value.numel() == 0 or not torch.isfinite(value.float()).all()):
        raise StepquantError("a tensor of a call is empty or not finite", where=where, got=tuple(value.shape))
    if name == STEPS and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise StepquantError("a call needs a positive number of steps", where=where, got=value)
    if is_text(name) and isinstance(value, list) and len(value) != 1:
        raise StepquantError(
            "a call makes one result and has one prompt",
            where=where,
            got=f"{len(value)} of them",
            fix="write a line for each",
        )
    return value
