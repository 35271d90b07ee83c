"""Folders that appear whole or not at all, and what the system refuses, as one error."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from stepquant.errors import StepquantError

MORE_SPACE = "free disk space, then run again with --resume: recorded trajectories are kept"
WHAT_TO_DO = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None), MORE_SPACE)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end; it is made at once, so that a bad place fails early."""
    remove_abandoned(out)
    folder = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with writing(out):
            if out.exists() and not out.is_dir():
                raise NotADirectoryError(None, "a file of that name is in the way")
            folder.mkdir(parents=True)
        yield folder
        with writing(out):
            os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(out: Path) -> None:
    """Folders of runs that were killed; a living process keeps its own."""
    for folder in out.parent.glob(f".{out.name}.*.part"):
        with suppress(ValueError, PermissionError):
            try:
                os.kill(int(folder.suffixes[-2][1:]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """What the system refuses while files are written, as one error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StepquantError(
            f"cannot write: {getattr(error, 'strerror', None) or error}",
            where=str(where),
            fix=WHAT_TO_DO.get(getattr(error, "errno", None), "choose another --out"),
        ) from error
