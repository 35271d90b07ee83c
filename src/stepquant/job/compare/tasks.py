"""Tasks: the pieces of work that a comparison is made of. Each reads folders, writes one folder, and knows nothing else."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from stepquant import hub
from stepquant.calib.cache import atomically
from stepquant.core.digest import tensors_digest
from stepquant.job.compare.cell import Evaluation
from stepquant.job.compare.measure import Sets, measure_cell
from stepquant.job.compare.meter import Meter
from stepquant.job.compare.store import (
    ARTIFACT,
    QUANTIZED,
    RESULTS,
    WORK,
    digests,
    is_intact,
    write_json,
)
from stepquant.job.files import new_folder
from stepquant.job.inplace import run as quantize_pipeline
from stepquant.job.memory import peak_bytes, reset_peak, resident_bytes
from stepquant.job.pipelines import load
from stepquant.job.recipe import Recipe
from stepquant.job.store import weights_bytes
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.pipelines.modular import save
from stepquant.progress import Progress
from stepquant.report.images import decode, grid, write_image

SAMPLES = "samples.png"


class Task(BaseModel, ABC):
    """Something to do in this process or another one, here or elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    recipe: Recipe
    reads: dict[str, Path] = Field(default_factory=dict)  # by name; "model" where it is not an embedded one
    out: Path  # the folder that it writes into

    @property
    @abstractmethod
    def key(self) -> str:
        """Apart from every other task."""

    @abstractmethod
    def perform(self, progress: Progress) -> None: ...

    @property
    def model(self) -> str:
        return str(self.reads.get("model", self.recipe.model))


class Quantize(Task):
    """The artifact of a recipe, with what it took to make it."""

    kind: Literal["quantize"] = "quantize"

    @property
    def key(self) -> str:
        return f"quantize {self.out}"

    def perform(self, progress: Progress) -> None:
        recipe = self.recipe.model_copy(update={"model": self.model})
        pipeline, work = load(self.model, recipe.device), self.out / WORK
        denoiser = Denoiser.of(pipeline)
        float_bytes = sum(4 * value.numel() for value in denoiser.model.state_dict().values())
        reset_peak()
        start = resident_bytes()
        meter = Meter(progress, work / "spent.json")
        artifact = quantize_pipeline(pipeline, recipe, meter, cache=work)
        # The system counts late, by some pages of each thread: the peak may read less than the start.
        seconds, peak = meter.finish(), max(peak_bytes(), start, meter.former_peak)
        hub.attach(denoiser.model, artifact)
        target = self.out / ARTIFACT
        shutil.rmtree(target, ignore_errors=True)
        with new_folder(target) as folder:
            save(pipeline, folder, target.name)
        made = {"seconds": seconds, "peak_bytes": peak, "start_bytes": start}
        sizes = {"bytes": weights_bytes(target, [denoiser.component]), "float_bytes": float_bytes}
        write_json(self.out / QUANTIZED, made | sizes | {"files": digests(target)})
        shutil.rmtree(work, ignore_errors=True)


class Generate(Task):
    """Batches `first` to `last` of the images of one seed, a file each; what is there is kept."""

    kind: Literal["generate"] = "generate"
    evaluation: Evaluation
    seed: int
    first: int = 0
    last: int

    @property
    def key(self) -> str:
        return f"generate {self.out} {self.first} {self.last}"

    def perform(self, progress: Progress) -> None:
        missing = [n for n in range(self.first, self.last) if not is_intact(batch_file(self.out, n))]
        if not missing:
            return
        own = self.reads.get("artifact")
        pipeline = open_once(self.model if own is None else str(own / ARTIFACT), self.recipe.device)
        for number in progress.track(missing, "generating", len(missing)):
            images = make_batch(pipeline, self.recipe, self.evaluation, self.seed, number)
            keep_batch(batch_file(self.out, number), images)


class Measure(Task):
    """The results of a cell; images of the artifact that nobody made before are made on the way."""

    kind: Literal["measure"] = "measure"
    evaluation: Evaluation
    label: str

    @property
    def key(self) -> str:
        return f"measure {self.out}"

    def perform(self, progress: Progress) -> None:
        images, count = self.reads["images"], self.evaluation.batches
        fields = self.model_dump(include={"title", "recipe", "reads", "evaluation"})
        Generate(**fields, seed=self.recipe.seed, last=count, out=images).perform(progress)
        sets = Sets(self.reads["source"], images, self.reads["other"], count)
        artifact, chosen = self.reads["artifact"], self.evaluation.reading(self.reads)
        found = measure_cell(self.model, artifact, self.recipe, chosen, sets, progress)
        write_image(grid(decode(found["images"]["quantized"])), self.out / SAMPLES)
        write_json(self.out / RESULTS, found | {"label": self.label})


AnyTask = Annotated[Quantize | Generate | Measure, Field(discriminator="kind")]
READER: TypeAdapter[AnyTask] = TypeAdapter(AnyTask)


def read_task(text: str) -> AnyTask:
    return READER.validate_json(text)


@lru_cache(maxsize=1)
def open_once(folder: str, device: str) -> Any:
    """A worker that generates several pieces of one set loads its pipeline once."""
    return load(folder, device)


def batch_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def make_batch(pipeline: Any, recipe: Recipe, evaluation: Evaluation, seed: int, number: int) -> Tensor:
    seeds = evaluation.seeds(seed, number)
    return run(pipeline, seeds, evaluation.sampling(recipe))


def keep_batch(file: Path, images: Tensor) -> None:
    tensors = {"images": images.float().cpu().contiguous()}
    note = {"digest": tensors_digest(tensors)}
    atomically(file, partial(save_file, tensors, metadata=note))
