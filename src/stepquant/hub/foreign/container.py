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
FLOATS = ("F32", "F16", "BF16", "F64")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
LATENT_DIFFUSION = "input_blocks.0.0.weight"  # the first weight of U-Nets in original names
WEIGHTS = "diffusion_pytorch_model"  # how diffusers calls them


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
            "only safetensors and GGUF files are read, and folders of SDNQ",
            where=str(path),
            got=path.suffix or path.name,
            expected="a name that ends in .safetensors or .gguf",
        )
    return of_files(path, [path])


@dataclass(frozen=True)
class Shards:
    """Answers from the file that has the tensor."""

    handles: Mapping[str, Any]

    def get_tensor(self, name: str) -> Tensor:
        return self.handles[name].get_tensor(name)  # type: ignore[no-any-return]


def open_folder(path: Path) -> Container:
    """The weights of a network as diffusers writes them, in one file or several."""
    files = sorted(path.glob(f"{WEIGHTS}*.safetensors"))
    if not files:
        raise ArtifactError(
            "this folder holds no weights of a network",
            where=str(path),
            expected=f"{WEIGHTS}.safetensors, or several of them",
            fix="give the folder of the network, as transformer or unet of its pipeline",
        )
    return of_files(path, files)


def of_files(path: Path, files: Sequence[Path]) -> Container:
    """Read the headers."""
    handles: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    try:
        for file in files:
            handle = safe_open(file, framework="pt")  # type: ignore[no-untyped-call]
            if twice := sorted(set(handle.keys()) & set(handles)):
                raise ArtifactError(
                    f"tensor '{twice[0]}' is in two files of the folder",
                    where=str(path),
                    fix="keep one set of files",
                )
            handles |= dict.fromkeys(handle.keys(), handle)
            metadata |= handle.metadata() or {}
        prefix = prefix_of(list(handles))
        slices = {name: handle.get_slice(name) for name, handle in handles.items() if name.startswith(prefix)}
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
    return Container(path, prefix, entries, len(handles) - len(entries), metadata, Shards(handles))
