"""Published methods, one file each. This folder is the registry: every file with a Method is offered by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from stepquant.errors import MethodError, UnknownNameError
from stepquant.methods.method import Method


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "method")


def kind(name: str) -> type[Method]:
    """The Method class in the file of that name."""
    if name not in names():
        raise UnknownNameError("method", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one Method"
    return found[0]


def build(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method with these fields; unknown or unfit ones are an error."""
    method, settings = kind(name), dict(settings or {})
    for key in settings:
        if key not in method.model_fields:
            raise UnknownNameError(f"field of method '{name}'", key, method.model_fields)
    try:
        return method(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise MethodError(
            f"field '{field}' of method '{name}': {first['msg']}", got=first["input"]
        ) from error
