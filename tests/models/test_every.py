"""Every model class that diffusers exports is known by name."""

from __future__ import annotations

from collections import Counter

import diffusers
from diffusers import ModelMixin

from tests.models.every import BUILDERS, BUILT_ELSEWHERE, NO_DENOISERS, NOT_TINY


def exported() -> set[str]:
    """The models that diffusers exports, but for the autoencoders."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers)}
    return {
        name
        for name, kind in found.items()
        if isinstance(kind, type)
        and issubclass(kind, ModelMixin)
        and kind is not ModelMixin
        and not kind.__module__.startswith("diffusers.models.autoencoders.")
    }


def test_every_exported_class_is_known_once() -> None:
    known = Counter([*BUILDERS, *BUILT_ELSEWHERE, *NO_DENOISERS, *NOT_TINY])
    assert known == Counter(exported())
