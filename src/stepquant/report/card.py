"""The model card of an artifact: README.md in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stepquant.report.page import flat, template
from stepquant.report.tables import code, escaped, markdown, megabytes, one_line, table
from stepquant.schema import Report

MOST_STEPS = 50


def card(
    results: Mapping[str, Any],
    samples: str | None = "samples.png",
    steps: int | None = None,
    output: str = "images",
    modular: bool = False,
) -> str:
    """Who it is, how to load it, what was measured. `samples` is an image beside it, or None.

    output: what the pipeline calls what it makes. steps: in which it is best sampled; those it was calibrated over, at most 50, where nothing is said.
    """
    report = Report.from_json(results)
    recipe = report.quantized.recipe
    text: str = template("card.md", escape=False).render(
        report=report,
        base=base_model(report.source.name),
        samples=samples,
        output=output,
        modular=modular,
        prompt='"a prompt", ' if recipe.get("prompts") else "..., " if recipe.get("calls") else "",
        steps=steps or min(int(recipe.get("steps", MOST_STEPS)), MOST_STEPS),
        runs=how_it_runs(report),
        rows=table(report),
        table=markdown(report),
        recipe=[(key, value) for key, value in flat(recipe) if value != "null"],
        megabytes=megabytes,
        escaped=escaped,
        code=code,
        scalar=scalar,
    )
    return text.rstrip() + "\n"


def base_model(name: str) -> str:
    """The name of a model on the hub, `owner/name`; embedded models and folders have none."""
    owner, _, rest = name.partition("/")
    return name if owner and rest and "/" not in rest and ":" not in name else ""


def scalar(text: str) -> str:
    """A string of YAML: what JSON quotes is one."""
    return json.dumps(one_line(text), ensure_ascii=False)


def how_it_runs(report: Report) -> str:
    if any(site.port == "input" and site.grid for site in report.plan):
        return "on CPUs stepquant multiplies integers, and `stepquant inspect` says which layers do."
    return "they are turned into floats layer by layer as they are needed, which saves memory and not time."
