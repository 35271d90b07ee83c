"""What results are: plain JSON in this schema, whose types `Report` checks; the report reads nothing else.

format       1
float        {name, class, parameters, digest}: the denoiser before quantization
quantized    {name, method, scheme, digest, recipe}: as the artifact tells it
sampling     {sampler, steps, calls, seed, images, batch, size: [height, width], medium}; `calls` of the denoiser
             an image; `medium` is images, videos or sounds, whose size is [channels, samples]
environment  {stepquant, torch, diffusers, python, cpu, threads}
quality      [{name, against, value, low, high, n, better, unit, reference, change_low, change_high, floor, floor_of,
               extractor, resize, note, unavailable}]
             `better` is higher, lower, zero or one; `value` is null and `unavailable` says why where it cannot be
             measured; `low`..`high` is a 95 % interval; `floor` is the same number with the float model on other
             seeds in the quantized model's place; `reference` with the float model on the same seeds in its place, and
             `change_low`..`change_high` a 95 % interval of value less reference, of the seeds that both share
portions     [{name, area, float, quantized, other}]: of each kind of parts that images are composed of, the percentage
             of the area, and of the squared error to the nearest legal image; empty where parts are not known
steps        [{step, t, relative, cosine, own_relative, own_cosine, state_relative}]: the noise prediction by
             denoising step, on the float trajectory and (own_) on each model's own; x_t on their own
blocks       {steps: [int], t: [float], rows: [{path, sqnr: [decibel or null by step]}]}
inputs       [{path, limits: [low, high] or null, low, high, clipped}]: what layers of the float model receive at the
             steps of `blocks`, and the share outside the limits of the quantized model's integers; lists by step
times        {t: [by step], nearest: [step], rate, worst, shown: [step], cosine: [[]]} or null: for each step the one
             whose float time embedding is nearest to the quantized one, the share of steps where that is another
             time, the least cosine of a step with itself, and the cosines of the shown steps, quantized by row
images       {seeds: [int], float: [PNG as base64], quantized: [PNG as base64]}
speed        {threads, rounds, reference, rows: [{batch, name, layout, milliseconds, low, high, ratio, ratio_low,
              ratio_high, unavailable}]}: quartiles; `ratio` is how many times faster than `reference`
size         {float_bytes, bytes, ratio}
making       {seconds, peak_bytes, start_bytes}: what quantizing took; a comparison measures it
parts        [{name, class, digest, size, coverage}]: the quantized networks beside the denoiser; `macs` of the call in
             which a layer did most, when the pipeline made one image
coverage     [{path, role, macs, bytes, weight, input, kernel, integer, reason}]: what one call did that was followed
             operation by operation; `macs` for an image, `integer` whether integer kernels multiplied all of them; beside
             them `rotation`, the group in which an input is rotated
cost         {macs, bops, float_bops, bytes, rows: [{weight, input, layers, macs, bops, bytes}]}: by the bits of the
             grids, whatever kernel multiplied
plan         [{path, role, port, grid, reason}]: grid null where the site stays float
"""

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
    medium: str = "images"


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
    change_low: float | None = None
    change_high: float | None = None
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
    rotation: int = 0
    kernel: str = ""
    integer: bool
    reason: str = ""


class Beside(Part):
    """A quantized network beside the denoiser."""

    name: str
    kind: str = Field("", alias="class")
    digest: str = ""
    size: Size
    coverage: tuple[Coverage, ...] = ()


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
    parts: tuple[Beside, ...] = ()
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
