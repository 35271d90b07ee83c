"""What is measured of a cell: everything that `evaluate` measures, from images that are on disk, and the speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.evaluate import Twins, benchmark, evaluate
from stepquant.evaluate.metrics.measure import Batch
from stepquant.job.compare.cell import Evaluation, other_seed
from stepquant.job.compare.store import ARTIFACT, QUANTIZED, read_json
from stepquant.job.pipelines import load
from stepquant.job.recipe import Recipe
from stepquant.job.results import describe_artifact
from stepquant.models.call import texts
from stepquant.models.generate import asked_of
from stepquant.progress import Progress

BASELINE = ("fp32 eager",)


@dataclass(frozen=True)
class Sets:
    """Folders of images: of the float model and of the artifact on the same seeds, of the float model on others."""

    source: Path
    quantized: Path
    other: Path
    count: int  # files in each

    def batches(self, pipeline: Any, recipe: Recipe, chosen: Evaluation) -> Iterator[Batch]:
        """With what they were to show, where they were asked for it."""
        sampling = chosen.sampling(recipe)
        for number in range(self.count):
            name = f"{number:05d}.safetensors"
            folders = (self.source, self.quantized, self.other)
            source, quantized, other = (read_images(folder / name) for folder in folders)
            seeds = [chosen.seeds(seed, number) for seed in (recipe.seed, other_seed(recipe.seed))]
            ours, others = (texts(asked_of(pipeline, some, sampling)) for some in seeds)
            yield Batch(source, quantized, other, ours, others)


def read_images(file: Path) -> Tensor:
    try:
        with safe_open(file, "pt") as stored:
            images: Tensor = stored.get_tensor("images")
            return images
    except (OSError, SafetensorError) as error:
        raise StepquantError(
            f"images of the comparison cannot be read: {error}",
            where=str(file),
            fix="run the same command again: damaged files are made again",
        ) from error


def measure_cell(
    model: str, artifact: Path, recipe: Recipe, chosen: Evaluation, sets: Sets, progress: Progress
) -> dict[str, Any]:
    """Results as `stepquant.schema` describes them."""
    folder = artifact / ARTIFACT
    twins = Twins(load(model, recipe.device), load(folder, recipe.device))
    found = evaluate(
        twins,
        chosen.sampling(recipe),
        images=chosen.images,
        seed=recipe.seed,
        batch=chosen.batch,
        data=chosen.data,
        shown=chosen.shown,
        probed=chosen.probed,
        weights=chosen.weights,
        stored=progress.track(sets.batches(twins.float, recipe, chosen), "measuring images", sets.count),
    )
    found |= describe_artifact(twins, folder, artifact.name) | {"making": making(artifact)}
    if chosen.speed:
        options: dict[str, Any] = {"seconds": chosen.speed, "prompts": recipe.asked}
        found["speed"] = benchmark(
            twins.float, twins.quantized, batches=(chosen.batch,), baselines=BASELINE, **options
        )
    return found


def making(artifact: Path) -> dict[str, Any]:
    """Seconds and peak memory of quantizing."""
    known = read_json(artifact / QUANTIZED) or {}
    return {name: known.get(name) for name in ("seconds", "peak_bytes", "start_bytes")}
