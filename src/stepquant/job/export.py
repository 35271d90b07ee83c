"""Files that other programs read, made of an artifact: what would become of it, and the file."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stepquant.errors import ArtifactError, StepquantError, UnknownNameError
from stepquant.hub.attach import config_of
from stepquant.hub.config import Name
from stepquant.hub.exports.at_rest import Network, at_rest
from stepquant.hub.exports.outlook import Outlook
from stepquant.hub.exports.renamed import DIFFUSERS, ORIGINAL
from stepquant.job.files import follow_umask, writing
from stepquant.job.pipelines import load, prompts_of
from stepquant.models.denoiser import COMPONENTS, Denoiser, by_denoiser
from stepquant.models.hooks import first_arguments
from stepquant.models.pipelines.index import index_of
from stepquant.progress import Progress, Silent

WEIGHTS: Mapping[str, str] = {
    "comfyui": "stepquant.hub.exports.comfy",
    "gguf": "stepquant.hub.exports.gguf",
    "sdnq": "stepquant.hub.exports.sdnq",
}
GRAPHS: Mapping[str, str] = {
    "onnx": "stepquant.hub.exports.onnx",
    "openvino": "stepquant.hub.exports.openvino",
}
FORMATS = {**WEIGHTS, **GRAPHS}
RENAMED = ("comfyui", "gguf")  # files of programs that came before diffusers
NAMES = (ORIGINAL, DIFFUSERS)
SAMPLES = 2  # of the call by which a graph is traced: of one alone, its number would become part of the graph


@dataclass(frozen=True)
class Export:
    """A network that can be written in a format, and what that will carry of it."""

    network: Network
    to: str
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
    names: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the denoiser of an artifact as a file of another format, in the artifact's own integers.

    `to` is comfyui, gguf, sdnq (a folder), onnx or openvino. `component` says which of several networks; `names`, whether tensors are called as in the original repository.
    """
    check_place(Path(out), to)
    return write(exporting(folder, to, component, names), out, progress)


def exporting(
    folder: str | os.PathLike[str], to: str, component: str | None = None, names: str | None = None
) -> Export:
    """Everything but writing: what is wrong with the artifact, or asked of a format in vain, is said here."""
    format = format_of(to)
    if names not in (None, *NAMES):
        raise UnknownNameError("kind of names", str(names), NAMES)
    if names is not None and to not in RENAMED:
        raise StepquantError(
            f"names are not chosen in a file for {to}", got=f"names {names}", fix="leave --names out"
        )
    chosen = folder_of(Path(folder), component)
    if to in GRAPHS:
        format.check_installed()
        options: dict[str, Any] = {"arguments": arguments_of(Path(folder), chosen)}
    else:
        options = {"names": names or ORIGINAL} if to in RENAMED else {}
    network = at_rest(chosen)
    return Export(network, to, format.outlook(network, **options), options)


def arguments_of(folder: Path, chosen: Path) -> dict[str, Any]:
    """What the pipeline hands to the network: a graph is traced by them."""
    if folder == chosen:
        raise StepquantError(
            "a graph is traced in a call of its pipeline",
            where=str(folder),
            expected="the folder of the pipeline, with --component where it holds several networks",
        )
    found = {Denoiser.of(one).component: one for one in by_denoiser(load(folder))}
    if chosen.name not in found:
        raise ArtifactError(
            f"'{chosen.name}' denoises nothing, and no graph is made of it", expected=", ".join(found)
        )
    one = found[chosen.name]
    config = config_of(Denoiser.of(one).model)
    assert config is not None, "its folder says that it is quantized"
    return first_arguments(one, SAMPLES, prompts_of(config))


def write(export: Export, out: str | os.PathLike[str], progress: Progress | None = None) -> Exported:
    """Write in a folder of its own, and put the files in their place when all of them are complete."""
    target = Path(out)
    check_place(target, export.to)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            made = Path(folder)
            format_of(export.to).write(
                export.network, export.outlook, made / target.name, progress or Silent(), **export.options
            )
            follow_umask(made)
            files = sorted(made.iterdir(), key=lambda file: file.name == target.name)  # it comes last
            size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
            for file in files:
                os.replace(file, target.parent / file.name)
    return Exported(target, export.outlook, size)


def check_place(target: Path, to: str) -> None:
    """Before any work: a name of the right ending, which nothing has yet."""
    ends: str = format_of(to).ENDS
    if ends and target.suffix != ends:
        raise StepquantError(f"'{target}' does not end in {ends}", fix=f"--out {target.with_suffix(ends)}")
    if target.exists():
        raise StepquantError(f"'{target}' is there already", fix="choose another --out, or remove it")


def format_of(to: str) -> Any:
    if to not in FORMATS:
        raise UnknownNameError("format", to, FORMATS)
    return importlib.import_module(FORMATS[to])


def folder_of(folder: Path, component: str | None) -> Path:
    """The folder of the network that is meant: itself, or one of a pipeline."""
    if index_of(folder) is None:
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
