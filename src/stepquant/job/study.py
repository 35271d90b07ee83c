"""Studies of a model: how sensitive its sites are, how long its layers take, and the plan that follows from both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepquant import hub
from stepquant.calib.cache import atomically
from stepquant.errors import ModelError, StepquantError
from stepquant.evaluate.speed.layers import layer_times, read_times
from stepquant.evaluate.study.allocate import Allocation, Budget, allocate, read_sensitivity
from stepquant.evaluate.study.sensitivity import Study, sensitivity
from stepquant.evaluate.twins import Twins
from stepquant.job.pipelines import check_one_denoiser, load, prompts_of
from stepquant.job.recipe import Recipe
from stepquant.job.results import artifact_config, load_twin
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Progress


def study_model(recipe: Recipe, study: Study, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the sensitivity of every site that the recipe's plan quantizes, and write it as JSON.

    A run that was killed goes on where it was: finished sites are kept in the cache.
    """
    study.check()
    pipeline = load(recipe.model, recipe.device)
    check_one_denoiser(pipeline)
    if hub.config_of(Denoiser.of(pipeline).model) is not None:
        raise ModelError("the model is quantized already", fix="study the float model")
    found = sensitivity(pipeline, recipe.build_plan(), study, prompts=recipe.asked, progress=progress)
    write_json(out, found)
    return found


def time_layers(
    folder: Path,
    out: Path,
    against: str | None = None,
    *,
    batch: int = 8,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time every layer of an artifact beside that of its float model, and write it as JSON."""
    quantized = load(folder, device)
    check_one_denoiser(quantized)
    config = artifact_config(quantized, folder)
    source = load_twin(quantized, against, device)
    found = layer_times(Twins(source, quantized), batch=batch, prompts=prompts_of(config), progress=progress)
    write_json(out, found)
    return found


def allocate_file(
    file: Path, out: Path, kind: Budget, budget: float, metric: str = "noise", times: Path | None = None
) -> Allocation:
    """Write the plan of least expected loss within the budget."""
    study = read_sensitivity(read_json(file), metric)
    if kind == "ms" and times is None:
        raise StepquantError(
            "a budget of milliseconds needs the time of every layer",
            fix="time them once: stepquant layers DIR --out times.json, then add --times times.json",
        )
    table = None if times is None else read_times(read_json(times))
    found = allocate(study, kind, budget, table)
    write_json(out, found.plan.to_json())
    return found


def read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StepquantError(f"cannot read the file: {error}", where=str(file), expected="JSON") from error
    if not isinstance(data, dict):
        raise StepquantError("the file holds no JSON object", where=str(file), got=type(data).__name__)
    return data


def write_json(out: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=1) + "\n"
    atomically(out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
