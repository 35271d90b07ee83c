"""Quantize the denoiser of a pipeline, in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepquant import hub, methods
from stepquant.artifact import Artifact
from stepquant.calib.cache import cache_folder
from stepquant.calib.record import MEMORY, Source
from stepquant.core.policy import FloatSteps
from stepquant.errors import ModelError
from stepquant.job.calls import written_calls
from stepquant.job.parts import fit_parts, parts_of
from stepquant.job.pipelines import check_written
from stepquant.job.recipe import Recipe
from stepquant.models.attention import is_adapter
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser, by_denoiser, check_finite, denoisers
from stepquant.models.observe import shown
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent
from stepquant.quant.plan import Plan


def quantize(
    pipeline: Any,
    *,
    method: str = "ptq4dm",
    scheme: str | None = None,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    samples: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    calls: Sequence[Mapping[str, Any] | Call] = (),
    settings: Mapping[str, Any] | None = None,
    components: Sequence[str] = (),
    policy: str | None = None,
    progress: Progress | None = None,
) -> Any:
    """Quantize the denoiser of `pipeline`, or these `components` of it, in place: it runs in integers afterwards, and saves them.

    Where several denoisers share the steps, each is calibrated on those that it runs, while the others are float.

    `plan` puts rules before those of `scheme`, or stands alone when `scheme` is None. `calls` are arguments of the
    pipeline, one table for each trajectory, where a prompt is not all that it needs. `steps`: 100, or those of the calls. What `save_pretrained` then writes has
    no model card; `stepquant.write_card(folder)` adds one. `policy`: which steps keep activations in float, as `first=3,last=3`.
    """
    recipe = Recipe.of(
        model=str(pipeline.config.get("_name_or_path") or type(pipeline).__name__),
        method=method,
        scheme=scheme,
        plan=plan_json(plan),
        settings=dict(settings or {}) | methods.records(method, samples),
        steps=steps,
        sampler=sampler,
        seed=seed,
        prompts=prompts,
        calls=written_calls(calls),
        components=tuple(components),
        policy=policy,
    )
    attach_all(pipeline, run_all(pipeline, recipe, progress))
    return pipeline


def attach_all(pipeline: Any, artifacts: Mapping[str, Artifact], idle: Container[str] = ()) -> None:
    """Let every component run in the integers of its artifact; the `idle` ones are only to be saved."""
    for component, artifact in artifacts.items():
        hub.attach(getattr(pipeline, component), artifact, runs=component not in idle)


def run_all(
    pipeline: Any,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    memory: int = MEMORY,
    made_by: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Artifact]:
    """What the recipe makes of every component that it names, whose float weights may be gone afterwards.

    `made_by`: its provenance with each of the denoisers, where it is known already.
    """
    recipe.check()
    parts, aimed = parts_of(pipeline, recipe.components), by_denoiser(pipeline)
    known = made_by or [recipe.provenance(one) for one in aimed]
    made = {}
    if parts:
        source = source_of(pipeline, recipe, progress, memory=memory, digest=known[0]["model_digest"])
        made = fit_parts(source, parts, recipe, known[0])
    for one, provenance in zip(aimed, known):
        last = one is aimed[-1]  # the others are float while it is calibrated
        artifact = run(one, recipe, progress, memory=memory, provenance=provenance, expendable=last)
        made[Denoiser.of(one).component] = artifact
    return made


def plan_json(plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any] | None:
    if isinstance(plan, str | os.PathLike):
        plan = Plan.read(Path(plan))
    return plan.to_json() if isinstance(plan, Plan) else dict(plan) if plan is not None else None


def run(
    pipeline: Any,
    recipe: Recipe,
    progress: Progress | None = None,
    cache: Path | None = None,
    memory: int = MEMORY,
    provenance: Mapping[str, Any] | None = None,
    expendable: bool = False,
) -> Artifact:
    """What the recipe makes of this pipeline, which itself stays float unless its weights are `expendable`.

    `provenance` is that of the recipe with this pipeline, where it is known already.
    `cache` is a folder for recorded trajectories and finished blocks instead of the user's. `memory`: bytes of what
    flows into and out of blocks that are kept in memory; what is more goes to disk, and the result is the same.
    """
    recipe.check()
    denoiser = Denoiser.of(pipeline)
    if hub.config_of(denoiser.model) is not None:
        raise ModelError("the model is quantized already", fix="start from the float model")
    check_no_adapter(denoiser)
    check_finite(denoiser.model)
    for call in recipe.calls:
        check_written(pipeline, call)
    denoiser.model.eval()
    provenance = provenance or recipe.provenance(pipeline)
    source = source_of(pipeline, recipe, progress, cache, memory, provenance["model_digest"])
    denoiser = shown(pipeline, recipe.asked).giving_up(expendable)
    plan = plan_of(denoiser, recipe, source)
    artifact = recipe.build_method()(denoiser, plan, source)
    seen = {} if denoiser.seen is None else {"seen": denoiser.seen.to_json()}
    found = {} if recipe.budget is None else {"allocated": plan.to_json()["rules"]}
    return dataclasses.replace(artifact, recipe={**provenance, **seen, **found})


def float_steps_of(denoiser: Denoiser, recipe: Recipe, source: Source) -> FloatSteps | None:
    """The recipe's steps in float, by the t of its sampler."""
    if recipe.step_policy is None:
        return None
    if len(denoisers(source.pipeline)) > 1:
        raise ModelError(
            "a policy counts the steps of one denoiser, and this pipeline has several that share them",
            got=", ".join(denoisers(source.pipeline)),
            fix="leave the policy out",
        )
    return FloatSteps.of(recipe.step_policy, denoiser.component, source.times())


def planned(pipeline: Any, recipe: Recipe, progress: Progress | None = None) -> tuple[Denoiser, Plan]:
    """The float model, and what the recipe decides for its sites."""
    denoiser = shown(pipeline, recipe.asked)
    if recipe.budget is None:
        return denoiser, recipe.build_plan()  # which follows no trajectory
    return denoiser, plan_of(denoiser, recipe, source_of(pipeline, recipe, progress))


def plan_of(denoiser: Denoiser, recipe: Recipe, source: Source) -> Plan:
    spared = float_steps_of(denoiser, recipe, source)
    if recipe.budget is None:
        return dataclasses.replace(recipe.build_plan(), float_steps=spared)
    from stepquant.evaluate.study.automatic import automatic  # its solver takes a second to import

    return automatic(denoiser, recipe.budget, source, spared)


def source_of(
    pipeline: Any,
    recipe: Recipe,
    progress: Progress | None = None,
    cache: Path | None = None,
    memory: int = MEMORY,
    digest: str | None = None,
) -> Source:
    """The trajectories that the recipe is calibrated on."""
    return Source(
        pipeline,
        Sampling(recipe.steps, recipe.sampler, recipe.asked),
        recipe.seed,
        progress=progress or Silent(),
        cache=cache or cache_folder(),
        memory=memory,
        digest=digest,
    )


def check_no_adapter(denoiser: Denoiser) -> None:
    """An IP-Adapter is no part of the model's configuration: no folder that `from_pretrained` reads can hold it."""
    if any(is_adapter(module) for module in denoiser.model.modules()):
        raise ModelError(
            "the pipeline has an IP-Adapter, which cannot be saved with it",
            where=denoiser.component,
            expected="a pipeline without one",
            fix="pipe.unload_ip_adapter(); load it again into the quantized pipeline, where it runs in float",
        )
