"""Strict reading of JSON objects: every entry is known and of its kind, or an error names the one that is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepquant.errors import ArtifactError

AGAIN = "fetch the whole folder again, or quantize the model again"


@dataclass(frozen=True)
class Kind:
    """What an entry may be, in words and as a question."""

    words: str
    holds: Callable[[Any], bool]


TEXT = Kind("a string", lambda value: isinstance(value, str))
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind(
    "an object", lambda value: isinstance(value, Mapping) and all(isinstance(k, str) for k in value)
)
ANYTHING = Kind("anything", lambda _: True)


def integer(least: int) -> Kind:
    """true is no number, although Python counts with it."""
    return Kind(f"a whole number from {least} on", lambda v: type(v) is int and v >= least)


def one_of(*values: str) -> Kind:
    return Kind(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def list_of(kind: Kind, least: int) -> Kind:
    return Kind(
        f"a list of {least} or more, each {kind.words}",
        lambda v: isinstance(v, list | tuple) and len(v) >= least and all(map(kind.holds, v)),
    )


def table_of(kind: Kind) -> Kind:
    return Kind(f"an object whose entries are each {kind.words}", lambda value: is_table(value, kind))


def is_table(value: Any, kind: Kind) -> bool:
    return bool(OBJECT.holds(value) and all(map(kind.holds, value.values())))


def entries(
    data: Any, where: str, needed: Mapping[str, Kind], allowed: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """The entries of `data`: all that are needed, and beside them none but those allowed."""
    if not OBJECT.holds(data):
        raise wrong(where, data, OBJECT)
    kinds = {**needed, **(allowed or {})}
    missing, unknown = sorted(set(needed) - set(data)), sorted(set(data) - set(kinds))
    if missing or unknown:
        raise ArtifactError(
            f"'{where}' {'lacks' if missing else 'has the unknown'} key '{shown((missing or unknown)[0])}'",
            where=where,
            got=", ".join(map(shown, sorted(data))) or "no key",
            expected=", ".join(kinds),
            fix=AGAIN,
        )
    for key, value in data.items():
        if not kinds[key].holds(value):
            raise wrong(f"{where}.{key}", value, kinds[key])
    return dict(data)


def wrong(where: str, value: Any, kind: Kind) -> ArtifactError:
    return ArtifactError(
        f"'{where}' cannot be read",
        where=where,
        got=shown(repr(value)),
        expected=kind.words,
        fix=AGAIN,
    )


def shown(text: str) -> str:
    """A foreign word in a message, on one line and not for ever."""
    return text if len(text) <= 80 and text.isprintable() else f"{ascii(text[:80])[1:-1]}..."
