"""Report: results with their types checked. The schema is told in `stepquant.evaluate`; the report reads nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepquant.errors import EvaluationError


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Source(Part):
    name: str
    kind: str = Field("", alias="class")
    parameters: int = 0
    digest: str = ""


class Quantized(Part):
    name: str = ""
    method: str = ""
    scheme: str = ""
    digest: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)


class Sampling(Part):
    sampler: str
    steps: int
    calls: int
    seed: int
    images: int
    batch: int
    size: tuple[int, int]


class Number(Part):
    name: str
    against: str
    n: int
    better: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    reference: float | None = None
    floor: float | None = None
    floor_of: str = ""
    extractor: str = ""
    resize: str = ""
    note: str = ""
    unavailable: str = ""


class Portion(Part):
    """A kind of parts that images are composed of: percentages of the area and of the squared error."""

    name: str
    area: float
    source: float = Field(alias="float")
    quantized: float
    other: float | None = None


class Step(Part):
    step: int
    t: float
    relative: float
    cosine: float
    own_relative: float | None = None
    own_cosine: float | None = None
    state_relative: float | None = None


class Block(Part):
    path: str
    sqnr: tuple[float | None, ...]


class Blocks(Part):
    steps: tuple[int, ...]
    t: tuple[float, ...]
    rows: tuple[Block, ...]


class Input(Part):
    path: str
    limits: tuple[float, float] | None = None
    low: tuple[float, ...]
    high: tuple[float, ...]
    clipped: tuple[float | None, ...]


class Times(Part):
    """For each step the one whose float time embedding is nearest; cosines of the shown steps."""

    t: tuple[float, ...]
    nearest: tuple[int, ...]
    rate: float
    worst: float
    shown: tuple[int, ...]
    cosine: tuple[tuple[float, ...], ...]


class Images(Part):
    seeds: tuple[int, ...]
    source: tuple[str, ...] = Field(alias="float")
    quantized: tuple[str, ...]


class Timing(Part):
    batch: int
    name: str
    layout: str = ""
    unavailable: str = ""
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


class Speed(Part):
    threads: int
    rounds: int
    reference: str
    rows: tuple[Timing, ...]


class Size(Part):
    float_bytes: int
    bytes: int
    ratio: float


class Making(Part):
    """What it took to quantize; `start_bytes` were resident before it began."""

    seconds: float | None = None
    peak_bytes: int | None = None
    start_bytes: int | None = None


class Coverage(Part):
    path: str
    role: str
    macs: int
    bytes: int = 0
    weight: str = "float"
    input: str = "float"
    kernel: str = ""
    integer: bool
    reason: str = ""


class Precision(Part):
    """Layers whose weights and inputs have these numbers of bits."""

    weight: int
    input: int
    layers: int
    macs: int
    bops: int
    bytes: int


class Cost(Part):
    macs: int
    bops: int
    float_bops: int
    bytes: int
    rows: tuple[Precision, ...]


class Decision(Part):
    path: str
    role: str
    port: str
    grid: str | None
    reason: str


class Report(Part):
    """All that a page shows; parts that were not measured are None or empty."""

    format: int = 1
    source: Source = Field(alias="float")
    quantized: Quantized = Quantized()
    sampling: Sampling | None = None
    environment: dict[str, str | int] = Field(default_factory=dict)
    quality: tuple[Number, ...] = ()
    portions: tuple[Portion, ...] = ()
    steps: tuple[Step, ...] = ()
    blocks: Blocks | None = None
    inputs: tuple[Input, ...] = ()
    times: Times | None = None
    images: Images | None = None
    speed: Speed | None = None
    size: Size | None = None
    making: Making | None = None
    coverage: tuple[Coverage, ...] = ()
    cost: Cost | None = None
    plan: tuple[Decision, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise EvaluationError(
                f"these results cannot be shown: {first['msg']}",
                where=where,
                got=str(first.get("input"))[:80],
                fix="evaluate again with this version of stepquant",
            ) from error

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    @property
    def title(self) -> str:
        parts = (self.source.name, self.quantized.scheme, self.quantized.method)
        return " · ".join(part for part in parts if part)

    def number(self, name: str, *, data: bool = False) -> Number | None:
        """The first number of that name with a value: against the float model, or against data."""
        wanted = (x for x in self.quality if x.name == name and x.value is not None)
        return next((x for x in wanted if x.against.startswith("float") != data), None)
