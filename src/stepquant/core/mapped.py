"""Tensors whose numbers lie on disk: the system reads them where they are used, and may let them go again at any time."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError


class MappedParameter(nn.Parameter):
    """A weight in a file. What comes to stand in its place goes into a file, too, in `folder`."""

    folder: Path

    @classmethod
    def of(cls, value: Tensor, folder: Path, like: Tensor) -> MappedParameter:
        # Also where nothing is learnt of it: torch multiplies in another order where no gradient is wanted.
        made = cls(value, requires_grad=like.requires_grad)
        made.folder = folder
        return made


def alike(parameter: Tensor, value: Tensor) -> nn.Parameter:
    """A copy of `value` as a parameter, which lies on disk if `parameter` does."""
    if isinstance(parameter, MappedParameter):
        return MappedParameter.of(copied(value.detach(), parameter.folder), parameter.folder, parameter)
    return nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)


def beside(parameter: Tensor, value: Tensor) -> Tensor:
    """The same numbers, on disk if those of `parameter` are."""
    return copied(value, parameter.folder) if isinstance(parameter, MappedParameter) else value


def copied(value: Tensor, folder: Path, kind: torch.dtype | None = None) -> Tensor:
    """The same numbers on disk, in a type of their own or another one: none of them are in memory on the way."""
    kind = kind or value.dtype
    return on_disk(value.shape, kind, folder).copy_(value) if value.numel() else value.to(kind, copy=True)


def on_disk(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """An empty tensor in a file without a name: it is gone with the last who reads it, and when the process is killed."""
    size = torch.Size(shape).numel()
    number, name = -1, ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=folder, prefix="mapped-")
        reserve(number, size * dtype.itemsize)
        return torch.from_file(name, shared=True, size=size, dtype=dtype).reshape(shape)
    except OSError as error:
        raise StepquantError(
            f"cannot write: {error.strerror or error}",
            where=str(folder),
            fix="free disk space, or let STEPQUANT_CACHE name a folder on a larger disk; then run again, with --resume",
        ) from error
    finally:
        if name:
            os.close(number)
            os.unlink(name)


def reserve(file: int, size: int) -> None:
    """On a full disk this is an error, where writing to mapped memory ends the process."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:  # a system, or a disk, that cannot
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(file, size)


def mapping(file: Path) -> mmap.mmap:
    """The bytes of a file, which nobody can write to."""
    # Not as torch maps files: memory that may be written to is counted as taken, by limits of a process and by a
    # system that refuses what is larger than its memory; shared, it would be written to the user's own file.
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def view(data: Any, dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> Tensor:
    """A tensor within these bytes."""
    size = torch.Size(shape).numel()
    if not size:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype, count=size, offset=begin).reshape(shape)
