"""Files that other programs wrote: what they hold, and the folder of a network made of one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepquant.errors import StepquantError
from stepquant.hub.config import Name, StepquantConfig
from stepquant.hub.foreign.convert import network_of, read_settings
from stepquant.hub.foreign.network import ForeignLayer
from stepquant.hub.foreign.read import packed_by, read
from stepquant.hub.foreign.sdnq import CONFIG
from stepquant.job.files import LAST, is_taken, new_folder, writing
from stepquant.job.pipelines import without_bars


@dataclass(frozen=True)
class Converted:
    """A folder that was written, and the recipe in it."""

    folder: Path
    recipe: Mapping[str, Any]
    layers: int  # whose weights are integers
    bytes: int


def convert(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    scheme: str | None = None,
) -> Converted:
    """Write the network in `file` as a folder that `from_pretrained` of its class loads, in the file's own integers.

    `config` is the config.json of the float network in diffusers' format, or a folder that holds it; a folder needs none.
    Without a `scheme` nothing is rounded. With one that needs no calibration, layers that it multiplies in integers are: those that
    have a scale by the row in the file keep its integers, and all others are rounded.
    """
    target = Path(out)
    if is_taken(target):
        raise StepquantError(f"'{out}' is there already", fix="choose another --out, or remove it")
    found = read(Path(file))
    with new_folder(target) as folder:
        model = network_of(found, None if config is None else Path(config), scheme)
        with writing(target), without_bars():
            model.save_pretrained(folder)
    told = model.hf_quantizer.quantization_config
    size = sum(one.stat().st_size for one in target.glob("*.safetensors"))
    return Converted(target, told.recipe, len(told.layers), size)


def inspect_file(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of itself, and what of it would run in integers here."""
    found = read(Path(file))
    rows = [row_of(layer) for layer in found.layers.values()]
    return {
        "file": str(file),
        "program": found.program,
        "dialect": found.dialect,
        "formats": counted(row["format"] for row in rows),
        "rotations": counted(str(row["rotation"]) for row in rows if row["rotation"]),
        "floats": len(found.floats),
        "others": found.file.others,
        "layers": rows,
    }


def inspect_network(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Where the integers of a network came from that lies alone in a folder, and how its layers are stored."""
    settings = read_settings(Path(folder) / "config.json")
    config = StepquantConfig.from_dict(settings[CONFIG])
    config.check_settings(settings, str(folder))
    layers = config.artifact.layers
    rows = [{"path": path, "input": "float"} | layers[path].to_json() for path in sorted(layers)]
    return {
        "folder": str(folder),
        "class": settings.get("_class_name", ""),
        "digest": config.digest,
        "recipe": config.recipe,
        "layers": rows,
    }


def is_network(folder: Path) -> bool:
    """Whether it holds one network packed here, and no pipeline around it."""
    return packed_by(folder) == Name.STEPQUANT.value and not (folder / LAST).exists()


def counted(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def row_of(layer: ForeignLayer) -> dict[str, Any]:
    return {
        "path": layer.path,
        "format": layer.format,
        "shape": list(layer.shape),
        "scales": layer.shared,
        "rotation": layer.rotation,
        "kept": layer.integer,  # its integers
        "integer": not layer.why_no_product,
        "reason": layer.why_no_product,
    }
