"""Published methods, one file each. This folder is the registry: every file with a Method is offered by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from stepquant.errors import MethodError, UnknownNameError
from stepquant.methods.correction import Corrected, Correction
from stepquant.methods.method import Method

KINDS = ("method", "learning", "correction")  # files that say what the others define
JOINT = "+"  # method+correction
MOST = 2**31 - 1  # of anything that is counted


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in KINDS)


def modules(name: str) -> tuple[str, ...]:
    """The modules in which `method` or `method+correction` is written."""
    return tuple(f"methods.{part}" for part in name.split(JOINT))


def kind(name: str) -> type[Method] | type[Correction]:
    """The Method or the Correction in the file of that name."""
    if name not in names():
        raise UnknownNameError("method", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method | Correction)
        and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one Method or Correction"
    return found[0]


def corrects(name: str) -> bool:
    """Whether `name` corrects what another method made, and is written behind it: `minmax+ptqd`."""
    return issubclass(kind(name), Correction)


def build(name: str, settings: Mapping[str, Any] | None = None, bits: int | None = None) -> Method:
    """The method with these fields, `method` or `method+correction`; unknown or unfit ones are an error.

    bits: of the weights, on which published numbers may depend.
    """
    base, _, last = name.partition(JOINT)
    if last:
        fields = share_out((base, last), dict(settings or {}))
        if corrects(base) or not corrects(last):
            raise MethodError(
                f"'{name}' is not a method and a correction",
                expected=f"one of {', '.join(n for n in names() if not corrects(n))}, '+', and one of "
                f"{', '.join(n for n in names() if corrects(n))}",
            )
        method, correction = (make(part, fields[part], bits) for part in (base, last))
        return Corrected(method=cast(Method, method), correction=cast(Correction, correction))
    if corrects(base):
        raise MethodError(
            f"'{base}' corrects what another method made", fix=f"name both, as --method minmax+{base}"
        )
    return cast(Method, make(base, dict(settings or {}), bits))


def records(name: str, samples: int | None) -> dict[str, int]:
    """The setting of so many calibration records: of a method, not of the correction behind it."""
    base, joint, _ = name.partition(JOINT)
    return {} if samples is None else {f"{base}.samples" if joint else "samples": samples}


def share_out(parts: tuple[str, str], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Which part each field belongs to; `part.field` says so where both have one of that name."""
    fields: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for key, value in settings.items():
        owner, dot, field = key.rpartition(".")
        if dot and owner not in parts:
            raise UnknownNameError(f"part of '{JOINT.join(parts)}'", owner, parts)
        owners = [owner] if dot else [part for part in parts if field in kind(part).model_fields]
        if len(owners) > 1:
            raise MethodError(
                f"both parts have a field '{field}'", fix=f"say which: --set {owners[0]}.{field}={value}"
            )
        fields[owners[0] if owners else parts[0]][field] = value
    return fields


def make(name: str, settings: Mapping[str, Any], bits: int | None = None) -> BaseModel:
    fields = kind(name).model_fields
    for key in settings:
        if key not in fields:
            raise UnknownNameError(f"field of method '{name}'", key, fields)
    try:
        made = kind(name).model_validate(dict(settings), context={"bits": bits})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise MethodError(
            f"field '{field}' of method '{name}': {first['msg']}", got=first["input"]
        ) from error
    for field, value in made:
        if isinstance(value, int) and value > MOST:
            raise MethodError(
                f"field '{field}' of method '{name}' is too large", got=value, expected=f"at most {MOST}"
            )
    return made
