"""Cell: one run of a comparison. Its name follows from everything that decides its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepquant import methods
from stepquant.calib.record import trajectory_seed
from stepquant.core.digest import value_digest
from stepquant.errors import StepquantError
from stepquant.evaluate.metrics.classifiers import SHIPPED
from stepquant.evaluate.metrics.instruments import Weights, load_networks
from stepquant.evaluate.metrics.reference import data_digest, is_statistics
from stepquant.evaluate.results import FIRST_SEED
from stepquant.job.compare.code import code_digest
from stepquant.job.recipe import Recipe
from stepquant.models import zoo
from stepquant.models.call import described
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import words_of
from stepquant.models.sampling import Sampling, scheduler_of

# Raised when the same settings come to mean another result by what no key covers: jobs, and how artifacts are stored.
FORMAT = 1
# Modules that make images of the float model and measure; an artifact is made by those of its method.
SAMPLING = ("models.generate", "calib.record")
MEASURING = ("evaluate", "evaluate.cost", "evaluate.describe", "hub", "models.hooks")


class Evaluation(BaseModel):
    """How the images of a cell are made and measured; the seed is that of its recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(2048, ge=2)
    steps: int = Field(50, ge=1)
    sampler: str | None = None
    batch: int = Field(32, ge=1)
    data: str | None = None  # what the model was trained on; None leaves the distance to data out
    speed: float = Field(3.0, ge=0)  # seconds of timing beside float; 0: none
    shown: int = Field(16, ge=1)
    probed: int = Field(16, ge=1)  # trajectories that are followed step by step
    weights: Weights = Weights()  # of the networks that measure

    @classmethod
    def of(cls, **fields: Any) -> Evaluation:
        """With these fields; what does not fit is one error that names the field."""
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise StepquantError(f"'{name}' of the evaluation: {first['msg']}", got=first["input"]) from error

    def sampling(self, recipe: Recipe) -> Sampling:
        """With the prompts that an embedded model brings, which its artifacts do not."""
        return Sampling(self.steps, self.sampler, recipe.asked or zoo.prompts(recipe.model))

    @property
    def batches(self) -> int:
        return -(-self.images // self.batch)

    def seeds(self, seed: int, number: int) -> list[int]:
        """Of one batch's trajectories: cut at fixed places, so that nobody's images depend on who made which of them."""
        places = range(number * self.batch, min((number + 1) * self.batch, self.images))
        return [trajectory_seed(seed, FIRST_SEED + place) for place in places]

    def files(self) -> dict[str, Path]:
        """What a worker needs to measure, by name: networks, and data that are one file."""
        one = self.data is not None and is_statistics(self.data)
        return self.weights.given() | ({"data": Path(str(self.data))} if one else {})

    def reading(self, files: Mapping[str, Path]) -> Evaluation:
        """The same with these files in place of its own."""
        found = {name: files[name] for name in self.files()}
        data = str(found.pop("data", self.data)) if self.data is not None else None
        return self.model_copy(update={"weights": Weights(**found), "data": data})

    def instruments(self, *, prompted: bool) -> dict[str, Any]:
        """Digests of what measures and of the data, by name; what cannot be read is an error."""
        own = load_networks(self.weights, self.data, prompted=prompted).digests()
        asked = self.data is not None and self.data not in SHIPPED
        return own | ({"data": data_digest(str(self.data))} if asked else {})


class Cell(BaseModel):
    """A recipe with a name for people, and how its artifact is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    recipe: Recipe
    evaluation: Evaluation

    @property
    def scheme(self) -> str:
        return self.recipe.build_plan().name

    @property
    def title(self) -> str:
        return f"{self.label} {self.scheme} seed {self.recipe.seed}"

    @property
    def sampling(self) -> Sampling:
        """Of the images that are measured."""
        return self.evaluation.sampling(self.recipe)

    @property
    def other_seed(self) -> int:
        return other_seed(self.recipe.seed)


def other_seed(seed: int) -> int:
    """Whose float images are the noise floor: a neighbour's, so that few sets serve many seeds."""
    return seed - 1 if seed else 1


@dataclass(frozen=True)
class Origin:
    """The float model of a comparison: what names of cells need to know about it."""

    digest: str
    schedulers: Mapping[str, Any]
    instruments: Mapping[Evaluation, Mapping[str, Any]]
    pipeline: Any

    @classmethod
    def of(cls, pipeline: Any, cells: Sequence[Cell]) -> Origin:
        samplers = {name for cell in cells for name in (cell.recipe.sampler, cell.evaluation.sampler)}
        made = {str(name): scheduler_of(pipeline, name) for name in samplers}
        known = {name: [type(one).__name__, dict(one.config)] for name, one in made.items()}
        prompted = all(words_of(pipeline, cell.sampling) for cell in cells)
        tools = {one: one.instruments(prompted=prompted) for one in {cell.evaluation for cell in cells}}
        return cls(Denoiser.of(pipeline).digest(), known, tools, pipeline)

    def artifact_key(self, cell: Cell) -> str:
        """Of all that decides the bytes of the artifact."""
        known = cell.recipe.provenance(self.pipeline)
        kept = {name: value for name, value in known.items() if name not in ("model", "versions")}
        scheduler = self.schedulers[str(cell.recipe.sampler)]
        return key_of(kept | {"scheduler": scheduler}, methods.modules(cell.recipe.method))

    def images_key(self, cell: Cell, seed: int) -> str:
        """Of all that decides the float model's images of one seed."""
        asked = self.sampling(cell) | {"seed": seed, "model": self.digest}
        return key_of(asked, SAMPLING)

    def cell_key(self, cell: Cell, artifact: str) -> str:
        """Of all that decides what is measured of the artifact with that name."""
        asked = cell.evaluation.model_dump(mode="json", exclude={"weights"}) | self.sampling(cell)
        # Where files lie decides nothing.
        asked |= self.instruments[cell.evaluation]
        return key_of(asked | {"artifact": artifact}, MEASURING)

    def sampling(self, cell: Cell) -> dict[str, Any]:
        chosen = cell.evaluation
        return {
            "images": chosen.images,
            "steps": chosen.steps,
            "batch": chosen.batch,
            "scheduler": self.schedulers[str(chosen.sampler)],
            "prompts": [described(one) for one in words_of(self.pipeline, cell.sampling)],
        }


def key_of(known: Mapping[str, Any], modules: tuple[str, ...]) -> str:
    """Values before a dot, code behind it: cells that differ in their code alone share the first half."""
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    values = value_digest({"format": FORMAT, "versions": versions} | dict(known))
    return f"{values[:16]}.{code_digest(modules)[:8]}"
