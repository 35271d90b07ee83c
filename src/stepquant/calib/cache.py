"""Files that appear whole or not at all, and where cached ones live."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from stepquant.errors import StepquantError


def cache_folder() -> Path:
    """`STEPQUANT_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("STEPQUANT_CACHE") or Path.home() / ".cache" / "stepquant")


def atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name beside `target` and rename; nothing half-written stays behind."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{target.name}.*.part"):
            remove_if_orphaned(leftover)
        write(temporary)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise StepquantError(
            f"cannot write: {getattr(error, 'strerror', None) or error}",
            where=str(target),
            fix="free disk space or check permissions, then run again, with --resume where there is one; finished parts are kept",
        ) from error
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
