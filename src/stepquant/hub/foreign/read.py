"""Which program a file is of, and what it holds."""

from __future__ import annotations

from pathlib import Path

from stepquant.hub.foreign.comfy import read_file
from stepquant.hub.foreign.container import open_file
from stepquant.hub.foreign.gguf import open_gguf, read_gguf
from stepquant.hub.foreign.network import ForeignFile


def read(path: Path) -> ForeignFile:
    """By its ending; what does not begin as its ending says is an error."""
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf(open_gguf(path))
    return read_file(open_file(path))
