"""What a recipe decides, site by site, in a form that people can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepquant.cli.screen import Screen
from stepquant.core.policy import StepPolicy
from stepquant.job import Recipe, load, planned
from stepquant.job.parts import HOW, parts_of, plan_for_parts
from stepquant.models.denoiser import Denoiser, by_denoiser
from stepquant.quant.plan import PORTS, Decision, Plan


def explain_all(screen: Screen, recipe: Recipe) -> dict[str, Any]:
    """What the plan decides in every component of the recipe."""
    pipeline = load(recipe.model)
    parts = parts_of(pipeline, recipe.components)
    result: dict[str, Any] = {}
    for one in by_denoiser(pipeline):
        with screen.reporter as progress:
            decided = planned(one, recipe, progress)
        found = explain_plan(screen, *decided)
        result |= found if one is pipeline else {Denoiser.of(one).component: found}
    result |= explain_policy(screen, recipe.step_policy)
    if not parts:
        return result
    screen.show()
    screen.show(f"{HOW}; layers that none of those reaches keep their inputs in float")
    told = {}
    for part in parts:
        screen.show()
        screen.show(f"{part.component}: {type(part.model).__name__}")
        told[part.component] = explain_plan(screen, part, plan_for_parts(recipe.build_plan()))
    return result | {"parts": told}


def explain_plan(screen: Screen, denoiser: Denoiser, plan: Plan) -> dict[str, Any]:
    """Print the rules with what each decides, then every site; returns the same as JSON."""
    decisions = list(plan.resolve(denoiser).values())
    if denoiser.family.generic and denoiser.family.t:
        screen.show(
            f"{type(denoiser.model).__name__}: generic, no declaration; roles follow from its first call"
        )
        screen.show()
    counts = [sum(decision.rule == index for decision in decisions) for index in range(len(plan.rules))]
    screen.table(
        f"plan {plan.name}: the first rule that matches a site decides",
        ("rule", "grid", "sites", "roles", "ports", "reason"),
        [
            (index, text(rule.grid), counts[index], ", ".join(rule.roles), ", ".join(rule.ports), rule.reason)
            for index, rule in enumerate(plan.rules)
        ],
    )
    screen.show()
    explain_layers(screen, [d for d in decisions if d.port in PORTS["layer"]])
    explain_products(screen, [d for d in decisions if d.port in PORTS["product"]])
    return {"plan": plan.to_json(), "sites": [site_json(decision) for decision in decisions]}


def explain_layers(screen: Screen, decisions: Sequence[Decision]) -> None:
    ports = {(d.path, d.port): d for d in decisions}
    paths = list(dict.fromkeys(d.path for d in decisions))
    rows = []
    for path in paths:
        weight, inputs = (ports.get((path, port)) for port in PORTS["layer"])
        assert weight is not None
        read = ("", "") if inputs is None else (text(inputs.grid), inputs.rule)  # tables read places
        rows.append((path, weight.role, text(weight.grid), weight.rule, *read))
    screen.table(f"{len(paths)} layers", ("layer", "role", "weight", "rule", "input", "rule"), rows)


def explain_products(screen: Screen, decisions: Sequence[Decision]) -> None:
    if not decisions:
        return
    paths = list(dict.fromkeys(d.path for d in decisions))
    rows = [(path, d.port, text(d.grid), d.rule) for path in paths for d in decisions if d.path == path]
    screen.show()
    screen.table(f"{len(paths)} attention products", ("attention", "operand", "grid", "rule"), rows)


def explain_policy(screen: Screen, policy: StepPolicy | None) -> dict[str, Any]:
    """Print which steps the plan above is not for."""
    if policy is None:
        return {}
    screen.show()
    screen.show(f"policy {policy}: at {in_words(policy)} activations stay in float, whatever the plan says")
    return {"policy": str(policy)}


def in_words(policy: StepPolicy) -> str:
    counts = {"first": policy.first, "last": policy.last}
    parts = [
        f"the {name} {f'{count} steps' if count > 1 else 'step'}" for name, count in counts.items() if count
    ]
    return " and ".join(parts)


def text(grid: object) -> str:
    return "float" if grid is None else str(grid)


def site_json(decision: Decision) -> dict[str, Any]:
    return {
        "path": decision.path,
        "role": decision.role,
        "port": decision.port,
        "grid": text(decision.grid),
        "rule": decision.rule,
        "reason": decision.reason,
    }
