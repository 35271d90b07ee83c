"""Which program a file or a folder is of, and what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from stepquant.hub.config import SDNQ
from stepquant.hub.foreign.comfy import read_file
from stepquant.hub.foreign.container import open_file
from stepquant.hub.foreign.gguf import open_gguf, read_gguf
from stepquant.hub.foreign.network import ForeignFile
from stepquant.hub.foreign.sdnq import CONFIG, read_sdnq

FILES = (".safetensors", ".gguf")


def read(path: Path) -> ForeignFile:
    """A folder by its configuration, a file by its ending; what does not begin as its ending says is an error."""
    if packed_by(path) == SDNQ:
        return read_sdnq(path)
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf(open_gguf(path))
    return read_file(open_file(path))


def packed_by(folder: Path) -> str:
    """The `quant_method` of the network in a folder; nothing where there is none."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    config = said.get(CONFIG) if isinstance(said, Mapping) else None
    return str(config.get("quant_method", "")) if isinstance(config, Mapping) else ""


def is_foreign(path: Path) -> bool:
    """Whether another program wrote it: every file, because stepquant writes folders."""
    return packed_by(path) == SDNQ if path.is_dir() else path.suffix in FILES or path.is_file()
