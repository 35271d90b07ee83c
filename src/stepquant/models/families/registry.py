"""The families that there are, found by the class of a model."""

from __future__ import annotations

from torch import nn

from stepquant.errors import ModelError
from stepquant.models.families import unet
from stepquant.models.families.family import Family

FAMILIES: tuple[Family, ...] = unet.FAMILIES


def family_of(model: nn.Module) -> Family:
    name = type(model).__name__
    for family in FAMILIES:
        if name in family.models:
            return family
    known = ", ".join(sorted(model for family in FAMILIES for model in family.models))
    raise ModelError(f"models of class {name} are not supported", expected=known)
