"""Commands that list what there is: methods, schemes, models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from stepquant import methods as registry
from stepquant.cli.options import Json
from stepquant.cli.screen import Screen, size_text
from stepquant.errors import UnknownNameError
from stepquant.models import zoo
from stepquant.quant.auto import FORMS, Budget
from stepquant.quant.schemes import SCHEMES, scheme


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show the fields of this method.", show_default=False)
    ] = None,
    json: Json = None,
) -> None:
    """List the methods, or the fields of one that --set can change."""
    screen, names = Screen(), registry.names()
    if name is not None and name not in names:
        raise UnknownNameError("method", name, names)
    listed = {known: method_json(known) for known in (names if name is None else [name])}
    if name is None:
        screen.table(
            "", ("method", "what it does"), [(known, method["about"]) for known, method in listed.items()]
        )
    else:
        rows = [
            (key, field["default"], field["type"], field["about"])
            for key, field in listed[name]["fields"].items()
        ]
        screen.table(f"{name}: {listed[name]['about']}", ("--set", "default", "type", "meaning"), rows)
    screen.finish(json, listed)


def method_json(name: str) -> dict[str, Any]:
    kind = registry.kind(name)
    about = (kind.__doc__ or "").strip().splitlines()[0]
    return {"about": about, "fields": {key: field_json(field) for key, field in kind.model_fields.items()}}


def field_json(field: FieldInfo) -> dict[str, Any]:
    kind = getattr(field.annotation, "__name__", None)
    text = kind if kind and kind not in ("Literal", "Union") else str(field.annotation).replace("typing.", "")
    return {"default": field.default, "type": text.removeprefix("Literal"), "about": field.description}


def schemes(
    name: Annotated[
        str | None, typer.Argument(help="Show the rules of this scheme.", show_default=False)
    ] = None,
    json: Json = None,
) -> None:
    """List the schemes, or the rules of one."""
    screen = Screen()
    if name is None:
        screen.table("", ("scheme", "what it is"), [*SCHEMES.items(), *FORMS.items()])
        screen.finish(json, SCHEMES | FORMS)
        return
    budget = Budget.of(name)
    plan = scheme(name) if budget is None else budget.base()
    rows = [
        (index, str(rule.grid or "float"), ", ".join(rule.roles), ", ".join(rule.ports), rule.reason)
        for index, rule in enumerate(plan.rules)
    ]
    screen.table(
        f"{name}: the first rule that matches a site decides",
        ("rule", "grid", "roles", "ports", "reason"),
        rows,
    )
    screen.finish(json, plan.to_json())


def models(json: Json = None) -> None:
    """List the embedded models."""
    screen = Screen()
    listed = {name: model_json(name) for name in zoo.names()}
    screen.table(
        "",
        ("model", "size", "what it is"),
        [(n, size_text(m["bytes"]), m["about"]) for n, m in listed.items()],
    )
    screen.show("Any folder that pipeline.save_pretrained wrote is a model, too.")
    screen.finish(json, listed)


def model_json(name: str) -> dict[str, Any]:
    folder = zoo.path(name)
    card = (folder / "README.md").read_text(encoding="utf-8")
    return {
        "folder": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "about": first_sentence(card),
    }


def first_sentence(card: str) -> str:
    """Of the first paragraph of a model card that is neither front matter nor a heading."""
    body = card.split("---", 2)[2] if card.startswith("---") else card
    paragraphs = (" ".join(paragraph.split()) for paragraph in body.split("\n\n"))
    words = next((words for words in paragraphs if words and words[0] not in "#|!<"), "")
    return re.split(r"(?<=[.!?])\s", words)[0]


COMMANDS: Mapping[str, Callable[..., None]] = {"methods": methods, "schemes": schemes, "models": models}
