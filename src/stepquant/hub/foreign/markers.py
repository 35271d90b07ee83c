"""What files for ComfyUI say of their quantized layers: JSON beside each of them, or one table in the metadata.

There are two dialects of the tensors beside the layers. The native one names a `format`. That of ComfyUI-INT8-Fast names none, and
means int8. Nothing is guessed: a word that is not known here is an error, because a wrong guess makes noise of an image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepquant.core.rotation import is_group
from stepquant.errors import ArtifactError
from stepquant.hub.foreign.container import Container

INT8, FP8 = "int8_tensorwise", "float8_e4m3fn"
READ = (INT8, FP8)
NATIVE, FAST, TABLE = "native", "INT8-Fast", "metadata"
SUFFIX, METADATA = ".comfy_quant", "_quantization_metadata"
MOST_BYTES = 64 * 1024  # of one marker
USUAL_GROUP = 256  # where a marker says that it rotates, and not by how much
WORDS = ("format", "convrot", "convrot_groupsize", "per_row", "full_precision_matrix_mult")


@dataclass(frozen=True)
class Marker:
    """What is said of one layer."""

    format: str
    dialect: str
    rotation: int = 0
    float_product: bool = False  # its products are to be computed in float
    per_row: bool | None = None  # whether its scales are said to be one for each row


def markers_of(file: Container) -> dict[str, Marker]:
    """By the layer's path in the file."""
    names = sorted(name for name in file.entries if name.endswith(SUFFIX))
    beside = {name.removesuffix(SUFFIX): parse(beside_layer(file, name), file, name) for name in names}
    table = {
        path: parse(said, file, f"{METADATA}.layers.{path}", TABLE) for path, said in tabled(file).items()
    }
    for path in sorted(set(beside) & set(table)):
        one, other = beside[path], table[path]
        if (one.format, one.rotation) != (other.format, other.rotation):
            raise refused(
                f"layer '{path}' is described twice, and differently",
                file,
                f"{one} and {other}",
                "one description",
            )
    found = table | beside
    dialects = sorted({marker.dialect for marker in beside.values()})
    if len(dialects) > 1:
        odd = next(path for path in beside if beside[path].dialect != next(iter(beside.values())).dialect)
        raise refused(
            f"tensor '{odd}{SUFFIX}' is written in another dialect than those before it",
            file,
            ", ".join(dialects),
            "one dialect in a file",
        )
    return found


def beside_layer(file: Container, name: str) -> Any:
    entry = file.entries[name]
    if entry.dtype != "U8" or len(entry.shape) != 1:
        raise refused(f"marker '{name}' is no text", file, f"{entry.dtype} {entry.shape}", "U8 bytes")
    if entry.shape[0] > MOST_BYTES:
        raise refused(
            f"marker '{name}' is too long", file, f"{entry.shape[0]} bytes", f"at most {MOST_BYTES}"
        )
    return decoded(bytes(file.read(name).tolist()), file, name)


def tabled(file: Container) -> dict[str, Any]:
    if METADATA not in file.metadata:
        return {}
    said = decoded(file.metadata[METADATA].encode(), file, METADATA)
    layers = said.get("layers") if isinstance(said, Mapping) else None
    if not isinstance(layers, Mapping) or said.get("format_version") != "1.0":
        raise refused(
            f"metadata '{METADATA}' cannot be read",
            file,
            shortened(said),
            "an object with layers, and format_version 1.0",
        )
    return {path.removeprefix(file.prefix): layer for path, layer in layers.items()}


def decoded(data: bytes, file: Container, name: str) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise refused(f"marker '{name}' is no JSON", file, shortened(data), "UTF-8 JSON") from error


def parse(said: Any, file: Container, name: str, dialect: str = "") -> Marker:
    """The marker, or an error that names it."""
    if not isinstance(said, Mapping):
        raise refused(f"marker '{name}' is no object", file, shortened(said), "a JSON object")
    inner = said.get("params", {})
    words = {key: value for key, value in said.items() if key != "params"}
    words |= inner if isinstance(inner, Mapping) else {"params": inner}
    unknown = sorted(set(words) - set(WORDS))
    if unknown:
        raise refused(
            f"marker '{name}' says what is not known here",
            file,
            shortened(", ".join(unknown)),
            ", ".join(WORDS),
        )
    for word in ("convrot", "per_row", "full_precision_matrix_mult"):
        if not isinstance(words.get(word, False), bool):
            raise refused(f"'{word}' of marker '{name}' is no truth", file, words[word], "true or false")
    if "format" not in words and not ("per_row" in words and not dialect):
        raise refused(f"marker '{name}' names no format", file, shortened(said), ", ".join(READ))
    kind = words.get("format", INT8)
    if kind not in READ:
        raise refused(f"marker '{name}' names a format that is not read", file, kind, ", ".join(READ))
    return Marker(
        kind,
        dialect or (NATIVE if "format" in words else FAST),
        rotation_of(words, kind, file, name),
        words.get("full_precision_matrix_mult", False),
        words.get("per_row"),
    )


def rotation_of(words: Mapping[str, Any], kind: str, file: Container, name: str) -> int:
    group, turns = words.get("convrot_groupsize"), words.get("convrot", False)
    if not turns:
        if group is not None:
            raise refused(
                f"marker '{name}' has a group of rotation without saying that it rotates",
                file,
                f"convrot_groupsize {group}",
                "convrot true beside it",
            )
        return 0
    group = USUAL_GROUP if group is None else group
    if type(group) is not int or not is_group(group) or kind != INT8:
        raise refused(
            f"marker '{name}' rotates by what is no group",
            file,
            f"{group} in {kind}",
            f"a power of four, in {INT8}",
        )
    return group


def shortened(value: object) -> str:
    return ascii(value)[:120]


def refused(what: str, file: Container, got: object, expected: object) -> ArtifactError:
    return ArtifactError(
        what,
        where=str(file.path),
        got=got,
        expected=expected,
        fix="fetch the file again, or ask whoever wrote it for the native format of ComfyUI",
    )
