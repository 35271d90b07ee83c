"""Which program a file is of, and what it holds."""

from __future__ import annotations

from pathlib import Path

from stepquant.hub.foreign.comfy import read_file
from stepquant.hub.foreign.container import open_file
from stepquant.hub.foreign.gguf import open_gguf, read_gguf
from stepquant.hub.foreign.network import ForeignFile
from stepquant.hub.foreign.sdnq import is_folder, read_sdnq


def read(path: Path) -> ForeignFile:
    """A folder by its configuration, a file by its ending; what does not begin as its ending says is an error."""
    if path.is_dir() and is_folder(path):
        return read_sdnq(path)
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf(open_gguf(path))
    return read_file(open_file(path))
