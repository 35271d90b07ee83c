"""A safetensors file that anybody may have written: names, shapes and dtypes first, numbers when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepquant.errors import ArtifactError

# Files of all parts of a pipeline have the network under one of these; files of it alone may have none.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True)
class Entry:
    """What the header says of a tensor."""

    dtype: str  # in the words of safetensors: I8, F32, F8_E4M3
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Container:
    """The tensors of the network in a file, by their names without the prefix."""

    path: Path
    prefix: str
    entries: Mapping[str, Entry]
    others: int  # tensors of other parts, left where they are
    metadata: Mapping[str, str]
    handle: Any

    def read(self, name: str) -> Tensor:
        return self.handle.get_tensor(self.prefix + name)  # type: ignore[no-any-return]


def prefix_of(names: Sequence[str]) -> str:
    """What the tensors of the network begin with."""
    return next((one for one in PREFIXES if any(name.startswith(one) for name in names)), "")


def open_file(path: Path) -> Container:
    """Read the header; a file that is cut off, or no safetensors file, is one error."""
    if not path.is_file():
        raise ArtifactError(f"there is no file '{path}'", fix="check the path")
    if path.suffix != ".safetensors":
        raise ArtifactError(
            "only safetensors and GGUF files are read",
            where=str(path),
            got=path.suffix or path.name,
            expected="a name that ends in .safetensors or .gguf",
        )
    try:
        handle = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
        names = list(handle.keys())
        prefix = prefix_of(names)
        slices = {name: handle.get_slice(name) for name in names if name.startswith(prefix)}
        entries = {
            name.removeprefix(prefix): Entry(found.get_dtype(), tuple(found.get_shape()))
            for name, found in slices.items()
        }
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            "this is no intact safetensors file",
            where=str(path),
            got=str(error).splitlines()[0][:200],
            fix="fetch the file again: it may have been cut off",
        ) from error
    return Container(path, prefix, entries, len(names) - len(entries), dict(handle.metadata() or {}), handle)
