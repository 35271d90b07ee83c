"""The families that there are, found by the class of a model. This folder is the registry: every file with FAMILIES counts."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from torch import nn

from stepquant.errors import ModelError
from stepquant.models import families
from stepquant.models.families.beside import beside
from stepquant.models.families.family import Family
from stepquant.models.families.generic import generic

KINDS = ("beside", "family", "generic", "registry", "roles")  # files that say what the others declare


@cache
def declared() -> dict[str, Family]:
    """Every declared class of models with its family."""
    names = (module.name for module in pkgutil.iter_modules(families.__path__) if module.name not in KINDS)
    files = [importlib.import_module(f"{families.__name__}.{name}") for name in sorted(names)]
    return {model: family for file in files for family in file.FAMILIES for model in family.models}


def family_of(model: nn.Module) -> Family:
    """What is declared of the model's class, else what its signature says."""
    found = declared().get(type(model).__name__) or generic(model)
    if found is None:
        raise ModelError(
            f"models of class {type(model).__name__} are not supported",
            got="a forward() without a noisy input or without a time",
            expected=f"{', '.join(sorted(declared()))}, or another denoiser of diffusers",
        )
    return found


def top_of(model: nn.Module) -> Mapping[str, str]:
    """The roles that the model's family declares, be it a denoiser or not."""
    return (declared().get(type(model).__name__) or generic(model) or beside(model)).top


def is_generic(model: nn.Module) -> bool:
    """Whether it denoises, and nobody declared it."""
    return not is_declared(model) and generic(model) is not None


def is_declared(model: nn.Module) -> bool:
    return type(model).__name__ in declared()
