"""Files that other programs read, made of an artifact: what would become of it, and the file."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from stepquant.calib.cache import atomically
from stepquant.errors import ArtifactError, StepquantError, UnknownNameError
from stepquant.hub.config import Name
from stepquant.hub.exports.at_rest import Network, at_rest
from stepquant.hub.exports.outlook import Outlook
from stepquant.hub.exports.renamed import DIFFUSERS, ORIGINAL
from stepquant.job.files import writing
from stepquant.models.denoiser import COMPONENTS
from stepquant.progress import Progress, Silent

FORMATS: Mapping[str, str] = {"comfyui": "stepquant.hub.exports.comfy"}
NAMES = (ORIGINAL, DIFFUSERS)


@dataclass(frozen=True)
class Export:
    """A network that can be written in a format, and what that will carry of it."""

    network: Network
    format: ModuleType
    outlook: Outlook
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    file: Path
    outlook: Outlook
    bytes: int


def export(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    component: str | None = None,
    names: str = ORIGINAL,
    progress: Progress | None = None,
) -> Exported:
    """Write the denoiser of an artifact as a file of another format, in the artifact's own integers.

    `to` is one of comfyui. `component` says which of several networks; `names`, whether tensors are called as in the original repository.
    """
    return write(exporting(folder, to, component, names), out, progress)


def exporting(
    folder: str | os.PathLike[str], to: str, component: str | None = None, names: str = ORIGINAL
) -> Export:
    """Everything but writing: what is wrong with the artifact, or asked of a format in vain, is said here."""
    if to not in FORMATS:
        raise UnknownNameError("format", to, FORMATS)
    if names not in NAMES:
        raise UnknownNameError("kind of names", names, NAMES)
    network, format = at_rest(folder_of(Path(folder), component)), importlib.import_module(FORMATS[to])
    options = {"names": names}
    return Export(network, format, format.outlook(network, **options), options)


def write(export: Export, out: str | os.PathLike[str], progress: Progress | None = None) -> Exported:
    """Write the file under another name, and give it its own when it is complete."""
    target = Path(out)
    check_place(target, export.format.ENDS)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        atomically(
            target,
            lambda file: export.format.write(
                export.network, export.outlook, file, progress or Silent(), **export.options
            ),
        )
    return Exported(target, export.outlook, target.stat().st_size)


def check_place(target: Path, ends: str) -> None:
    if target.suffix != ends:
        raise StepquantError(f"'{target}' does not end in {ends}", fix=f"--out {target.with_suffix(ends)}")
    if target.exists():
        raise StepquantError(f"'{target}' is there already", fix="choose another --out, or remove it")


def folder_of(folder: Path, component: str | None) -> Path:
    """The folder of the network that is meant: itself, or one of a pipeline."""
    if not (folder / "model_index.json").is_file():
        if component is not None:
            raise ArtifactError(
                f"'{folder}' is no pipeline, which alone has components", fix="leave --component out"
            )
        return folder
    found = {
        file.parent.name: file.parent for file in sorted(folder.glob("*/config.json")) if is_packed(file)
    }
    if component is not None and component not in found:
        raise UnknownNameError("quantized component", component, found)
    usual = [name for name in COMPONENTS if name in found]
    chosen = component or (
        usual[0] if len(usual) == 1 else next(iter(found), None) if len(found) == 1 else None
    )
    if chosen is None:
        raise ArtifactError(
            f"'{folder}' holds {len(found)} quantized networks",
            got=", ".join(found) or "none",
            fix="say which: --component NAME" if found else "stepquant quantize it first",
        )
    return found[chosen]


def is_packed(file: Path) -> bool:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    told = settings.get("quantization_config") if isinstance(settings, Mapping) else None
    return isinstance(told, Mapping) and told.get("quant_method") == Name.STEPQUANT.value
