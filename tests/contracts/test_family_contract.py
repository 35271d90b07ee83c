"""Every declaration is measured, and a wrong one is found."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from diffusers.models import attention_processor, resnet

from stepquant.errors import ModelError
from stepquant.models.denoiser import Denoiser
from stepquant.models.families import registry, roles
from tests.contracts.families import broken
from tests.models.tiny import CASES, Case


@pytest.mark.parametrize("name", CASES)
def test_declaration_holds(name: str) -> None:
    case = tiny(name)
    denoiser = Denoiser(case[0])
    assert not broken(denoiser, case)
    family = denoiser.family
    named = {family.x, family.t, *family.text, *family.cond, *family.shared}
    assert named <= set(denoiser.signature.parameters)
    assert family.guidance != "none" or not family.text, "how is a prompt guided by?"


def test_every_declared_class_has_a_tiny_model() -> None:
    assert {type(tiny(name)[0]).__name__ for name in CASES} == set(registry.declared())


def test_the_documentation_names_every_declared_class() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in registry.declared() if name not in page]


@cache
def tiny(name: str) -> Case:
    case = CASES[name]()
    case[0].eval()
    return case


def promises(name: str, **wrong: Any) -> list[str]:
    """Those that break when a part of the declaration is another."""
    case = tiny(name)
    denoiser = Denoiser(case[0])
    denoiser.family = replace(denoiser.family, **wrong)
    try:
        return broken(denoiser, case)
    except ModelError as error:
        return [str(error)]


def with_role(name: str, path: str, role: str) -> dict[str, str]:
    return {**Denoiser(tiny(name)[0]).family.top, path: role}


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("plain", {"top": with_role("plain", "conv_out", "time")}, "conv_out .time. also depends on"),
        ("plain", {"top": with_role("plain", "time_embedding.linear_1", "cond")}, "several roles|also depends"),
        ("flux", {"top": with_role("flux", "context_embedder", "stem")}, "depends only on \\['text'"),
        ("flux", {"cond": ("guidance",)}, "also depends on \\['pooled'"),
        ("flux", {"shared": ("img_ids",)}, "one sample alone"),
        ("flux", {"concats": lambda _: {}}, "concatenation that nobody declares"),
        ("wan", {"text": ()}, "also depends on \\['text'"),
        ("hunyuandit", {"read": ()}, "no role"),
        ("lumina2", {"prompt_blocks": ()}, "depends only on \\['text'"),
        ("lumina2", {"prompt_blocks": ("noise_refiner",)}, "of the prompt's blocks depends on"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_found(name: str, wrong: dict[str, Any], words: str) -> None:
    found = promises(name, **wrong)
    assert any(re.search(words, line) for line in found), found


def test_a_wrong_order_is_found() -> None:
    blocks = Denoiser(tiny("text_to_image")[0]).family.blocks
    assert promises("text_to_image", blocks=lambda model: list(blocks(model))[::-1]) == [
        "blocks are not in execution order"
    ]


def test_wrong_widths_are_found() -> None:
    concats = Denoiser(tiny("text_to_image")[0]).family.concats
    found = promises("text_to_image", concats=lambda model: {p: w[::-1] for p, w in concats(model).items()})
    assert found
    assert all("reads no concatenation" in line for line in found)


@pytest.mark.parametrize(
    ("kind", "part", "words"),
    [
        (resnet.ResnetBlock2D, {"conv2": ""}, "no role"),
        (resnet.ResnetBlock2D, {"conv1": "modulate"}, "also depends on ['x']"),
        (attention_processor.Attention, {"to_q": "k_text"}, "also depends on ['t', "),
        (attention_processor.Attention, {"to_v": ""}, "no role"),
    ],
)
def test_a_wrong_part_is_found(
    kind: type, part: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {path: role for path, role in {**roles.PARTS[kind], **part}.items() if role}
    monkeypatch.setitem(roles.PARTS, kind, wrong)
    assert any(words in line for line in promises("text_to_image"))
