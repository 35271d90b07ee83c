"""Results of an artifact: what is known from the folder itself, and what was measured so far, in `results.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from stepquant import hub
from stepquant.calib.cache import atomically
from stepquant.errors import ArtifactError, StepquantError
from stepquant.evaluate import Twins, benchmark, evaluate, size
from stepquant.evaluate.cost import coverage
from stepquant.evaluate.describe import (
    describe_float,
    describe_networks,
    describe_plan,
    describe_quantized,
    environment,
    joined_digests,
)
from stepquant.evaluate.disk import size_beside
from stepquant.evaluate.metrics.reference import check_data
from stepquant.evaluate.parts import describe_parts, quantized_parts
from stepquant.evaluate.results import FORMAT
from stepquant.evaluate.several import named, sizes
from stepquant.job.fastest import fastest
from stepquant.job.files import writing
from stepquant.job.pipelines import load, prompts_of, sampling_of
from stepquant.models import zoo
from stepquant.models.call import Asked, Call
from stepquant.models.denoiser import Denoiser, by_denoiser, denoisers
from stepquant.models.hooks import first_arguments
from stepquant.progress import Progress
from stepquant.report import write as write_report

RESULTS = "results.json"
FEW = 2  # denoising steps before an image is decoded that nobody looks at
# What a model was trained on, where the distance to data can be measured offline.
DATA = dict.fromkeys(
    ("stepquant:characters", "stepquant:characters-dit", "stepquant:characters-text"), "characters"
)


def artifact_config(pipeline: Any, folder: Path) -> hub.StepquantConfig:
    """How the model of that pipeline was quantized; a float one is an error."""
    config = hub.config_of(Denoiser.of(pipeline).model)
    if config is None:
        raise ArtifactError(
            f"'{folder}' holds a float model",
            expected="an artifact, as `stepquant quantize --out DIR` writes it",
            fix=f"quantize it first: stepquant quantize {folder} --out DIR",
        )
    return config


def load_twin(quantized: Any, against: str | None, device: str = "cpu") -> Any:
    """The float pipeline that a quantized one was made of; another one is an error."""
    known = [hub.config_of(network) for network in denoisers(quantized).values()]
    recipes = [config.recipe for config in known if config is not None]
    name = against or recipes[0].get("model", "")
    if against is None and name not in zoo.names():
        raise StepquantError(
            "the float model is not an embedded one", got=name, fix="say where it is: --against FOLDER"
        )
    pipeline = load(name, device)
    if any(hub.config_of(network) is not None for network in denoisers(pipeline).values()):
        raise StepquantError(
            f"'{name}' is quantized itself", fix="compare with the float model: --against FOLDER"
        )
    digests = [Denoiser(network).digest() for network in denoisers(pipeline).values()]
    wanted = [recipe.get("model_digest", digest) for recipe, digest in zip(recipes, digests)]
    if digests != wanted:
        raise StepquantError(
            f"the artifact was not made of '{name}'",
            got=f"a model with digest {joined_digests(digests)}",
            expected=joined_digests(wanted),
            fix="compare with the model it was made of: --against FOLDER",
        )
    return pipeline


def describe_artifact(twins: Twins, folder: Path, name: str) -> dict[str, Any]:
    """All that follows from an artifact without measuring: origin, recipe, size, plan and coverage."""
    prompts = prompts_of(artifact_config(twins.quantized, folder))
    parts = [(one.source.component, one) for one in twins.by_denoiser()]
    arguments = [first_arguments(one.float, 1, prompts, one.quantized) for _, one in parts]
    covered = [coverage(one.source, one.other, given) for (_, one), given in zip(parts, arguments)]
    names = [component for component, _ in parts]
    return {
        "format": FORMAT,
        "float": describe_float(twins.float),
        "quantized": describe_quantized(twins.quantized) | {"name": name},
        "size": size(twins.float, folder),
        "coverage": named(list(zip(names, covered))),
        "plan": named([(component, describe_plan(one.source, one.other)) for component, one in parts]),
    } | further_parts(twins.quantized, folder)


def describe_alone(pipeline: Any, folder: Path) -> dict[str, Any]:
    """The same from the artifact alone, whose recipe names the float model: its shapes need no weights."""
    aimed = by_denoiser(pipeline)
    recipes = [artifact_config(one, folder).recipe for one in aimed]
    prompts = prompts_of(artifact_config(pipeline, folder))
    quantized = [Denoiser.of(one) for one in aimed]
    shapes = [shapes_of(one) for one in quantized]
    names = [one.component for one in shapes]
    networks = describe_networks(shapes, [recipe.get("model_digest", "") for recipe in recipes])
    covered = [
        coverage(shape, one, first_arguments(asked, 1, prompts))
        for shape, one, asked in zip(shapes, quantized, aimed)
    ]
    plans = [describe_plan(shape, one) for shape, one in zip(shapes, quantized)]
    return {
        "format": FORMAT,
        "float": {"name": recipes[0].get("model", "")} | networks,
        "quantized": describe_quantized(pipeline) | {"name": folder.resolve().name},
        "size": sizes([size_beside(one, folder) for one in shapes]),
        "coverage": named(list(zip(names, covered))),
        "plan": named(list(zip(names, plans))),
    } | further_parts(pipeline, folder)


def further_parts(pipeline: Any, folder: Path) -> dict[str, Any]:
    """What there is to say of the quantized networks beside the denoiser, if there are any."""
    config = artifact_config(pipeline, folder)
    known = [one for one in prompts_of(config) if isinstance(one, Call)]
    if not quantized_parts(pipeline) or any(one.stands_in for one in known):
        return {}
    short = sampling_of(pipeline)
    if not config.steps:  # any number of steps will do
        short = replace(short, steps=FEW)
    return {"parts": describe_parts(pipeline, folder, short)}


def shapes_of(quantized: Denoiser) -> Denoiser:
    """The float model that an artifact was made of, without numbers."""
    model: Any = quantized.model
    config = {name: value for name, value in model.config.items() if name != "quantization_config"}
    with torch.device("meta"):
        return Denoiser(type(model).from_config(config), component=quantized.component)


def inspect_artifact(
    folder: Path, batch: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Recipe and coverage, from the artifact alone: roles need no float weights.

    With `batch`, as it runs where layers stay in float that are faster so for such batches.
    """
    pipeline = load(folder)
    settings = artifact_config(pipeline, folder)
    timed = [] if batch is None else fastest(pipeline, batch, progress=progress)  # of all denoisers
    known = describe_alone(pipeline, folder)
    policy = settings.artifact.policy
    told = {} if policy is None else {"policy": {"steps": str(policy.policy), **policy.to_json()}}
    return known | told | {"steps": settings.steps, "times": [asdict(layer) for layer in timed]}


def read_results(folder: Path) -> dict[str, Any]:
    """What was measured so far; nothing yet is empty."""
    file = folder / RESULTS
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise StepquantError(
            f"cannot read the results: {error}", where=str(file), fix="remove it and evaluate again"
        ) from error


def measured_so_far(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The results of the artifact with what is known now; those of former weights are dropped."""
    former = read_results(folder)
    same = former.get("quantized", {}).get("digest") == known["quantized"]["digest"]
    return (former if same else {}) | dict(known)


def keep_results(folder: Path, results: Mapping[str, Any]) -> None:
    text = json.dumps(results, indent=1) + "\n"
    atomically(folder / RESULTS, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def update_results(folder: Path, twins: Twins, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Add what was measured to the results of the artifact."""
    known = describe_artifact(twins, folder, folder.resolve().name)
    results = measured_so_far(folder, dict(measured) | known)
    keep_results(folder, results)
    return results


def evaluate_artifact(
    folder: Path,
    against: str | None = None,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    prompts: Sequence[Asked] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compare an artifact with the float model it was made of; `options` as in `stepquant.evaluate`.

    Steps, sampler and prompts are what suits the artifact where they are not given.
    """
    quantized = load(folder, device)
    config = artifact_config(quantized, folder)
    twins = Twins(load_twin(quantized, against, device), quantized)
    options.setdefault("data", DATA.get(config.recipe.get("model", "")))
    check_data(options["data"])
    sampling = sampling_of(quantized, steps, sampler, prompts)
    measured = evaluate(twins, sampling, progress=progress, **options)
    return update_results(folder, twins, measured)


def benchmark_artifact(
    folder: Path,
    against: str | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Time an artifact beside the float model it was made of; `options` as in `stepquant.evaluate`."""
    quantized = load(folder, device)
    config = artifact_config(quantized, folder)
    source = load_twin(quantized, against, device)
    options["prompts"] = options.get("prompts") or prompts_of(config)
    speed = benchmark(source, quantized, progress=progress, **options)
    return update_results(folder, Twins(source, quantized), {"speed": speed, "environment": environment()})


def report_artifact(folder: Path, out: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Write the page about an artifact from what was measured so far."""
    if not folder.is_dir():
        raise StepquantError("there is no such artifact", where=str(folder), fix="check the path")
    results = read_results(folder)
    if not results:
        raise StepquantError(
            "nothing was measured yet",
            where=str(folder),
            fix=f"first: stepquant evaluate {folder}, stepquant benchmark {folder}",
        )
    with writing(out or folder):
        return write_report(results, out or folder), results
