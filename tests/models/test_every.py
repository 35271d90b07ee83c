"""Every denoiser class of diffusers is known by name, and its tiny model answers what it is asked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from tests.models.every import BUILDERS, BUILT_ELSEWHERE, NO_DENOISERS, NOT_TINY


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention traces itself anew for every shape unless this is set: seconds for three of the models."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def answer(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs))


def halved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value / 2 if value.is_floating_point() else value // 2
    return [halved(part) for part in value]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


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


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_tiny_model_answers_by_its_noise_and_its_time(name: str) -> None:
    model, inputs = BUILDERS[name]()
    first = answer(model, inputs)
    assert type(model).__name__ == name
    assert not model.training
    assert first
    assert all(tensor.isfinite().all() for tensor in first)
    assert equal(first, answer(*BUILDERS[name]()))
    noisy, times = next(iter(inputs)), [key for key in inputs if "time" in key]
    assert times
    for key in [noisy, *times]:
        assert not equal(first, answer(model, inputs | {key: halved(inputs[key])})), key
