"""Grid: every method in every scheme with every seed, and rows with settings of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepquant import methods as registry
from stepquant.errors import StepquantError, UnknownNameError
from stepquant.job.compare.cell import Cell, Evaluation
from stepquant.job.recipe import Recipe
from stepquant.job.results import DATA


@dataclass(frozen=True)
class Variant:
    """A method with settings, as `eda_dm:times=uniform,layers=0` says it."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        shown = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return self.name or (f"{self.method} ({shown})" if shown else self.method)


def grid(
    model: str,
    variants: Sequence[Variant],
    schemes: Sequence[str],
    seeds: Sequence[int],
    evaluation: Evaluation | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> list[Cell]:
    """Cells scheme by scheme; `settings` go to every method that has such a field, `recipe` to every recipe."""
    evaluation = evaluation or Evaluation.of(data=DATA.get(model))
    named = [
        Variant(one.method, shared(one, settings or {}) | dict(one.settings), one.label) for one in variants
    ]
    check_used(named, settings or {})
    cells = [
        Cell(
            label=one.label,
            recipe=Recipe.of(
                model=model,
                method=one.method,
                scheme=scheme,
                settings=dict(one.settings),
                seed=seed,
                **recipe,
            ),
            evaluation=evaluation,
        )
        for scheme in schemes
        for one in named
        for seed in seeds
    ]
    if not cells:
        raise StepquantError("nothing to compare", fix="name at least one method, one scheme and one seed")
    for cell in cells:
        cell.recipe.check()
    return cells


def shared(variant: Variant, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are fields of the method."""
    return {key: value for key, value in settings.items() if has_field(variant.method, key, value)}


def has_field(method: str, key: str, value: Any) -> bool:
    try:
        registry.build(method, {key: value})
    except UnknownNameError as error:
        if "field" in error.what:
            return False
        raise
    return True


def check_used(variants: Sequence[Variant], settings: Mapping[str, Any]) -> None:
    for key in settings:
        if not any(has_field(one.method, key, settings[key]) for one in variants):
            raise UnknownNameError("field of every method here", key, fields_of(variants))


def fields_of(variants: Sequence[Variant]) -> set[str]:
    names = {name for one in variants for name in one.method.split("+")}
    return {key for name in names for key in registry.kind(name).model_fields}
