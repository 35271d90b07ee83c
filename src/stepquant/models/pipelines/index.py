"""The file that makes a folder a pipeline, and says of what parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline

# A folder may have both: then it is an ordinary one.
ORDINARY, MODULAR = DiffusionPipeline.config_name, ModularPipeline.config_name
INDEXES = (ORDINARY, MODULAR)


def index_of(folder: Path) -> Path | None:
    """Where the folder of a pipeline says of what parts it is; None where it is none."""
    return next((folder / name for name in INDEXES if (folder / name).is_file()), None)


def read_index(folder: Path) -> dict[str, Any]:
    """Component -> library, class and, of modular ones, where it comes from; settings have other values than lists."""
    file = index_of(folder)
    assert file is not None, f"{folder} is no pipeline"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
