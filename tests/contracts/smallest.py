"""Methods small enough for a contract, made from what they declare and never from their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from annotated_types import Ge, Gt
from pydantic.fields import FieldInfo

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.core.digest import tensors_digest, value_digest
from stepquant.core.ranges import minmax
from stepquant.fit.ranges import set_weight_ranges
from stepquant.methods.correction import Corrected
from stepquant.methods.method import Method
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from tests.conftest import without_ends

T = TypeVar("T")
FEW = 4  # of everything that a method counts: records, trajectories, iterations


class Nearest(Method):
    """Rounds weights and looks at no data: under a correction, whatever data changes is the correction's."""

    calibrates: ClassVar[bool] = False

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        with insert(denoiser, plan) as network:
            set_weight_ranges(network, minmax, source.progress)
            return freeze(network)


def smallest(name: str, **settings: Any) -> Method:
    """The method of that name with few of everything but its settings, or a correction behind plain rounding."""
    few = few_of(name) | settings
    if methods.corrects(name):
        return Corrected(method=Nearest(), correction=methods.make(name, few))  # type: ignore[arg-type]
    return methods.build(name, few)


def few_of(name: str) -> dict[str, int]:
    """The least of every number that a method or a correction counts."""
    fields = methods.kind(name).model_fields
    return {key: max(FEW, least(field)) for key, field in fields.items() if is_many(field)}


def is_many(field: FieldInfo) -> bool:
    return type(field.default) is int and field.default > FEW


def least(field: FieldInfo) -> int:
    """The smallest number that a field of whole numbers takes."""
    bounds = [b.ge if isinstance(b, Ge) else b.gt + 1 for b in field.metadata if isinstance(b, Ge | Gt)]  # type: ignore[operator]
    return max(bounds, default=0)  # type: ignore[type-var,return-value]


def plan_for(name: str, bits: int = 4) -> Plan:
    """Weights of so many bits; activations of 8, but behind plain rounding, which sets no ranges for them."""
    return without_ends(f"w{bits}a16" if methods.corrects(name) else f"w{bits}a8")


def made(method: Method, plan: Plan, source: Source) -> Artifact:
    return method(Denoiser.of(source.pipeline), plan, source)


def digest(artifact: Artifact) -> str:
    """Of every byte that would be written."""
    return value_digest([tensors_digest(artifact.tensors), artifact.to_json()])


class Killed(BaseException):
    """As Ctrl-C, which no method may catch."""


class Counting:
    """Progress that counts what was done, and may end the run in the middle of it."""

    def __init__(self, last: int | None = None) -> None:
        self.done, self.last = 0, last

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        for item in items:
            if self.done == self.last:
                raise Killed
            self.done += 1
            yield item

    def note(self, words: str) -> None:
        return None
