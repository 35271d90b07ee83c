"""The families that there are, found by the class of a model. This folder is the registry: every file with FAMILIES counts."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from stepquant.errors import ModelError
from stepquant.models import families
from stepquant.models.families.family import Family

KINDS = ("family", "registry", "roles")  # files that say what the others declare


@cache
def declared() -> dict[str, Family]:
    """Every declared class of models with its family."""
    names = (module.name for module in pkgutil.iter_modules(families.__path__) if module.name not in KINDS)
    files = [importlib.import_module(f"{families.__name__}.{name}") for name in sorted(names)]
    return {model: family for file in files for family in file.FAMILIES for model in family.models}


def family_of(model: nn.Module) -> Family:
    name, known = type(model).__name__, declared()
    if name in known:
        return known[name]
    raise ModelError(f"models of class {name} are not supported", expected=", ".join(sorted(known)))
