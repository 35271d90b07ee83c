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
W4A4, W4A8 = "convrot_w4a4", "asym_w4a8_int8"  # which are always rotated
READ = (INT8, FP8, W4A4, W4A8)
NATIVE, FAST, TABLE = "native", "INT8-Fast", "metadata"
SUFFIX, METADATA = ".comfy_quant", "_quantization_metadata"
MOST_BYTES = 64 * 1024  # of one marker
USUAL_GROUP = 256  # where a marker says that it rotates, and not by how much
USUAL_SHARE = 16  # codes of the table that share a scale
WORDS = ("format", "convrot", "convrot_groupsize", "per_row", "full_precision_matrix_mult")
MORE_WORDS = {W4A4: ("linear_dtype",), W4A8: ("group_size",)}


@dataclass(frozen=True)
class Marker:
    """What is said of one layer."""

    format: str
    dialect: str
    rotation: int = 0
    float_product: bool = False  # its products are to be computed in float
    per_row: bool | None = None  # whether its scales are said to be one for each row
    share: int = 0  # how many codes of a table share a scale


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
    kind = words.get("format", INT8)
    known = (*WORDS, *(MORE_WORDS.get(kind, ()) if isinstance(kind, str) else ()))
    unknown = sorted(set(words) - set(known))
    if unknown:
        raise refused(
            f"marker '{name}' says what is not known here",
            file,
            shortened(", ".join(unknown)),
            ", ".join(known),
        )
    for word in ("convrot", "per_row", "full_precision_matrix_mult"):
        if not isinstance(words.get(word, False), bool):
            raise refused(f"'{word}' of marker '{name}' is no truth", file, words[word], "true or false")
    if words.get("linear_dtype", "int4") not in ("int4", "int8"):
        raise refused(
            f"'linear_dtype' of marker '{name}' is none that is read",
            file,
            words["linear_dtype"],
            "int4, int8",
        )
    if "format" not in words and not ("per_row" in words and not dialect):
        raise refused(f"marker '{name}' names no format", file, shortened(said), ", ".join(READ))
    if kind not in READ:
        raise refused(f"marker '{name}' names a format that is not read", file, kind, ", ".join(READ))
    return Marker(
        kind,
        dialect or (NATIVE if "format" in words else FAST),
        rotation_of(words, kind, file, name),
        words.get("full_precision_matrix_mult", False),
        words.get("per_row"),
        share_of(words, file, name) if kind == W4A8 else 0,
    )


def share_of(words: Mapping[str, Any], file: Container, name: str) -> int:
    share = words.get("group_size", USUAL_SHARE)
    if type(share) is not int or share < 4 or (USUAL_SHARE % share and share % USUAL_SHARE):
        raise refused(
            f"marker '{name}' has no group of scales", file, shortened(share), f"{USUAL_SHARE}, or a multiple"
        )
    return share


def rotation_of(words: Mapping[str, Any], kind: str, file: Container, name: str) -> int:
    always = kind in (W4A4, W4A8)
    group, turns = words.get("convrot_groupsize"), words.get("convrot", always)
    if always and not turns:
        raise refused(f"marker '{name}' is not rotated", file, "convrot false", f"convrot true in {kind}")
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
    if type(group) is not int or not is_group(group) or kind == FP8:
        raise refused(
            f"marker '{name}' rotates by what is no group",
            file,
            f"{group} in {kind}",
            "a power of four, in a format of integers",
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
