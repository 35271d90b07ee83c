"""Run store: a folder of JSON, safetensors and PNG that survives anything.

store.json                    {"format": 1}
artifacts/NAME-KEY/           artifact/ (a diffusers folder), quantized.json (seconds, peak memory, sizes, digests)
floats/KEY/00000.safetensors  images of the float model, a file a batch
cells/NAME-KEY/               cell.json, and results.json (measured), error.json (failed) or images/ (on the way)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from stepquant.calib.cache import atomically
from stepquant.core.digest import tensors_digest
from stepquant.errors import EvaluationError, StepquantError
from stepquant.job.compare.cell import FORMAT, Cell, Origin
from stepquant.schema import Report

MARKER, QUANTIZED, RESULTS, ERROR, CELL = (
    "store.json",
    "quantized.json",
    "results.json",
    "error.json",
    "cell.json",
)
SENSITIVITY = "sensitivity*.json"  # studies of single sites, which the page shows
ARTIFACT, IMAGES, WORK = "artifact", "images", "work"
ADDED = ("label", "cell")  # to results, by us


@dataclass(frozen=True)
class Places:
    """Where the parts of one cell are."""

    cell: Path
    artifact: Path
    source: Path  # images of the float model on the same seeds
    other: Path  # and on others

    @property
    def images(self) -> Path:
        return self.cell / IMAGES

    @property
    def all(self) -> tuple[Path, ...]:
        """Every folder that tasks write into for this cell."""
        return self.cell, self.images, self.artifact, self.source, self.other


@dataclass(frozen=True)
class Store:
    root: Path

    @classmethod
    def open(cls, root: Path, *, create: bool = True) -> Store:
        """The store in a folder; a new one is made in an empty folder only."""
        marker = root / MARKER
        if not marker.exists():
            if root.exists() and not is_empty(root):
                raise StepquantError(
                    f"'{root}' is no store of runs", got="other files", fix="choose a new or empty folder"
                )
            if not create:
                raise StepquantError(
                    f"there is no store of runs in '{root}'", fix="first: stepquant compare --out DIR"
                )
            atomically(marker, lambda temporary: temporary.write_text(json.dumps({"format": FORMAT}) + "\n"))
        found = read_json(marker)
        if found is None or found.get("format") != FORMAT:
            raise StepquantError(
                "the store of runs cannot be read",
                where=str(marker),
                got="a damaged file" if found is None else f"format {found.get('format')}",
                expected=f"format {FORMAT}",
                fix="choose another folder, or the stepquant that made it",
            )
        return cls(root)

    def places(self, cell: Cell, origin: Origin, any_code: bool = False) -> Places:
        """By content; with `any_code` a finished part that other code made is taken where there is none of this one."""
        name = f"{cell.recipe.method}-{cell.scheme}-s{cell.recipe.seed}"
        cells, artifacts = self.root / "cells", self.root / "artifacts"
        floats = [origin.images_key(cell, seed) for seed in (cell.recipe.seed, cell.other_seed)]
        artifact = artifacts / f"{name}-{origin.artifact_key(cell)}"
        if any_code:
            artifact = made_by_any_code(artifact, QUANTIZED)
        place = cells / f"{name}-{origin.cell_key(cell, artifact.name)}"
        if any_code:
            place = made_by_any_code(place, RESULTS)
        return Places(place, artifact, *(self.root / "floats" / key for key in floats))

    def cells(self) -> Iterator[Path]:
        """The folder of every cell that was ever asked for here."""
        yield from sorted(file.parent for file in (self.root / "cells").glob(f"*/{CELL}"))


def is_empty(folder: Path) -> bool:
    """But for studies of single sites, which may come first."""
    return folder.is_dir() and all(file.match(SENSITIVITY) for file in folder.iterdir())


def made_by_any_code(folder: Path, marker: str) -> Path:
    """That folder, or one whose name differs behind the dot alone, if only that one is finished."""
    if (folder / marker).exists():
        return folder
    others = folder.parent.glob(f"{folder.name.rpartition('.')[0]}.*/{marker}")
    return next((file.parent for file in sorted(others)), folder)


def read_json(file: Path) -> dict[str, Any] | None:
    """None where there is no such file, or a damaged one: its maker runs again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_found(cell: Path) -> dict[str, Any] | None:
    """The results of a cell; None where there are none yet, or others than a page can show."""
    found = read_json(cell / RESULTS)
    if found is None or "label" not in found:
        return None
    try:
        Report.from_json({key: value for key, value in found.items() if key not in ADDED})
    except EvaluationError:
        return None
    return found


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=1, default=str) + "\n"
    atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def is_intact(file: Path) -> bool:
    """Whether a file of tensors is there and holds what was written; a damaged one is made again."""
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            return (stored.metadata() or {}).get("digest") == tensors_digest(tensors)
    except (OSError, SafetensorError):
        return False


def digests(folder: Path) -> dict[str, str]:
    """Of every file in a folder, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()[:32] for file in files
    }


def artifact_intact(place: Path) -> bool:
    """Whether the artifact there is finished and its files are those that were written."""
    known = read_json(place / QUANTIZED)
    return known is not None and known.get("files") == digests(place / ARTIFACT)


def take_lock(folder: Path) -> FileLock | None:
    """The lock of a folder, or None where another process has it; the system lets go of those of the dead."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
