"""Networks beside the denoiser: which of them a recipe quantizes, and with what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from stepquant import hub
from stepquant.artifact import Artifact
from stepquant.calib.receive import receive
from stepquant.calib.record import Source
from stepquant.errors import ModelError
from stepquant.fit.extremes import fit_extremes
from stepquant.job.recipe import Recipe
from stepquant.models.denoiser import Seen, check_finite, denoisers
from stepquant.models.part import IDLE, NOT_CALLED, Part, seen_by
from stepquant.quant.plan import Plan, Rule

TRAJECTORIES = 16  # whose calls give ranges: parts have no steps that differ
HOW = "parts have no trajectory: whatever the method, their ranges are the extremes of the calls that they receive"
RULES = (
    Rule(None, "between latents and the network, a sliver of the work", ("latent",), optional=True),
    Rule(None, NOT_CALLED, (IDLE,), ("input",), optional=True),
)


def parts_of(pipeline: Any, components: Sequence[str]) -> list[Part]:
    """The networks beside the denoiser among these components, which must be there and hold something to quantize."""
    aimed = denoisers(pipeline)
    missing = [name for name in aimed if name not in components]
    if components and missing:
        raise ModelError(
            f"the denoiser '{missing[0]}' is not among the components",
            got=", ".join(components),
            expected="the denoiser, and what else is to be quantized with it",
            fix=f"--components {','.join((*missing, *components))}",
        )
    parts = [Part.named(pipeline, name) for name in dict.fromkeys(components) if name not in aimed]
    for part in parts:
        if hub.config_of(part.model) is not None:
            raise ModelError(f"'{part.component}' is quantized already", fix="start from the float model")
        check_finite(part.model)
    return parts


def plan_for_parts(plan: Plan) -> Plan:
    """The same plan for a network that may lack what its rules speak of."""
    rules = tuple(dataclasses.replace(rule, optional=True) for rule in plan.rules)
    return Plan(plan.name, (*RULES, *rules))


def trajectories_for(plan: Plan) -> int:
    """How many must be followed: for ranges, or to see what is reached at all, or for neither."""
    if not plan.quantizes_activations():
        return 0
    return TRAJECTORIES if plan.measures() else 1


def fit_parts(
    source: Source, parts: Sequence[Part], recipe: Recipe, provenance: Mapping[str, Any]
) -> dict[str, Artifact]:
    """An artifact of every part, ranges from the calls that it receives."""
    plan = plan_for_parts(recipe.build_plan())
    count = trajectories_for(plan)
    received = receive(source, parts, count) if count else {}
    made = {}
    for part in parts:
        name, calls = part.component, received.get(part.component, [])
        part.model.eval()
        known = seen_by(part, calls) if count else part.having(Seen())
        artifact = fit_extremes(known, plan, [{"call": call} for call in calls], source.progress)
        assert known.seen is not None
        own = {
            "component": name,
            "model_digest": part.digest(),
            "method": "minmax",
            "settings": {"trajectories": count},
            "plan": plan.to_json()["rules"],
            "seen": known.seen.to_json(),
        }
        made[name] = dataclasses.replace(artifact, recipe={**provenance, **own})
    return made
