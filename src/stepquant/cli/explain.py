"""What a plan decides, site by site, in a form that people can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepquant.cli.screen import Screen
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import PORTS, Decision, Plan


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
        weight, inputs = (ports[path, port] for port in PORTS["layer"])
        rows.append((path, weight.role, text(weight.grid), weight.rule, text(inputs.grid), inputs.rule))
    screen.table(f"{len(paths)} layers", ("layer", "role", "weight", "rule", "input", "rule"), rows)


def explain_products(screen: Screen, decisions: Sequence[Decision]) -> None:
    if not decisions:
        return
    paths = list(dict.fromkeys(d.path for d in decisions))
    rows = [(path, d.port, text(d.grid), d.rule) for path in paths for d in decisions if d.path == path]
    screen.show()
    screen.table(f"{len(paths)} attention products", ("attention", "operand", "grid", "rule"), rows)


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
