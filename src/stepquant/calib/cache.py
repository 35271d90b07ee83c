"""Files that appear whole or not at all, and where cached ones live."""

from __future__ import annotations

import os
from collections.abc import Callable
from glob import escape
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from stepquant.errors import StepquantError


def cache_folder() -> Path:
    """`STEPQUANT_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("STEPQUANT_CACHE") or platformdirs.user_cache_path("stepquant"))


def atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name beside `target` and rename; nothing half-written stays behind.

    A link stays: the file behind it is replaced. A device or a pipe is written to as it is.
    """
    try:
        if is_special(target):
            write(target)
        else:
            replace(Path(os.path.realpath(target)), write)
    except (OSError, SafetensorError) as error:
        raise StepquantError(
            f"cannot write: {getattr(error, 'strerror', None) or error}",
            where=str(target),
            fix="free disk space or check permissions, then run again, with --resume where there is one; finished parts are kept",
        ) from error


def is_special(file: Path) -> bool:
    """Whether `file` is a device, a pipe or another stream of the system, which no file may take the place of."""
    return file.exists() and not file.is_file()


def replace(target: Path, write: Callable[[Path], object]) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{escape(target.name)}.*.part"):
        remove_if_orphaned(leftover)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it: some libraries write for their owner alone
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_if_orphaned(leftover: Path) -> None:
    """Remove what a killed process left half-written; a living one is not disturbed."""
    try:
        os.kill(int(leftover.name.split(".")[-2]), 0)
    except (ProcessLookupError, ValueError):
        leftover.unlink(missing_ok=True)
    except PermissionError:
        return
