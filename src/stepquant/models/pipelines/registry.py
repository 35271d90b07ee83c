"""The kinds of pipelines that there are. This folder is the registry: every file with a KIND counts."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from stepquant.models import pipelines
from stepquant.models.pipelines import text
from stepquant.models.pipelines.kind import Kind

KINDS = ("kind", "registry", "calling", "results", "index", "modular")  # files that declare none


@cache
def declared() -> dict[str, Kind]:
    """Every declared class of pipelines with its kind."""
    names = (module.name for module in pkgutil.iter_modules(pipelines.__path__) if module.name not in KINDS)
    kinds = [importlib.import_module(f"{pipelines.__name__}.{name}").KIND for name in sorted(names)]
    return {name: kind for kind in kinds for name in kind.pipelines}


def kind_of(pipeline: Any) -> Kind:
    """That of its class or of a class above it; a pipeline that nobody declared is asked by a text."""
    known = declared()
    return next((known[one.__name__] for one in type(pipeline).__mro__ if one.__name__ in known), text.KIND)
