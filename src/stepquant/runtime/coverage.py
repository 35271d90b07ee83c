"""What really ran in integers: every layer and product of one traced forward pass, with its multiplications."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.models.families.roles import LEAVES
from stepquant.models.products import multiplies
from stepquant.runtime.blocks.chain import Chain, chains
from stepquant.runtime.blocks.install import forget_kept
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.embedding import LOOKED_UP, IntegerEmbedding
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.linear import LowRankBranch
from stepquant.runtime.layers.tabled import Tabled
from stepquant.runtime.macs import INTEGER_OPS, multiply_accumulates

NOT_PLANNED = "the plan keeps it in float"
BESIDE = "a branch of low rank in 16 bits, which the plan leaves beside the integers"
TABLED = "a table holds what it returns for every t"
IDLE = "it did not run in this pass"
INLINE = "its processor multiplies by itself, in float"
OUTSIDE = "(between layers)"
BETWEEN = "products of attention that its class computes by itself, in float"
ASTRAY = "it has an integer kernel, and multiplied in float all the same"


@dataclass(frozen=True)
class Line:
    """One layer or attention product, and what it did.

    `planned` means that the plan gives all its operands a grid; `integer` that integer kernels multiplied all of them.
    """

    path: str
    kind: str  # layer or product
    macs: int
    planned: bool
    integer: bool
    kernel: str  # the operation that multiplied most, or float
    reason: str | None


@dataclass(frozen=True)
class Coverage:
    lines: tuple[Line, ...]

    @property
    def macs(self) -> int:
        return sum(line.macs for line in self.lines)

    @property
    def share_of_planned(self) -> float:
        """Of the multiplications that the plan quantizes, the share that ran in integers."""
        planned = sum(line.macs for line in self.lines if line.planned)
        return (
            sum(line.macs for line in self.lines if line.planned and line.integer) / planned
            if planned
            else 0.0
        )

    @property
    def share_of_all(self) -> float:
        return sum(line.macs for line in self.lines if line.integer) / self.macs if self.macs else 0.0


def coverage(model: nn.Module, arguments: Mapping[str, Any]) -> Coverage:
    """Run `model(**arguments)` once and see which operations each layer and product multiplied by."""
    lines = traced(model, lambda: model(**arguments)).lines
    return Coverage(tuple(line for line in lines if line.path != OUTSIDE))


def traced(model: nn.Module, call: Callable[[], object]) -> Coverage:
    """The same for anything that `call` asks of `model`; what multiplies outside of layers has a line of its own."""
    forget_kept(model)
    # Operations made of others are seen as those others, except in inference mode.
    with Trace(model) as trace, torch.inference_mode(False), torch.no_grad():
        call()
    lines = tuple(trace.lines())
    if OUTSIDE in trace.work:
        lines += (Trace.line(OUTSIDE, "product", trace.work[OUTSIDE], False, BETWEEN),)
    return Coverage(lines)


class Trace(TorchDispatchMode):
    """How much was multiplied, by which operations, while each layer or product was at work."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.working: list[str] = []
        self.work: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, str | None] = {}  # of products, for the operands that they had
        self.stack = ExitStack()

    def __enter__(self) -> Trace:
        path_of = {module: path for path, module in self.model.named_modules()}
        for chain in chains(self.model):
            self.stack.enter_context(apart(chain))
            for mix in chain.mixes:  # which multiplies without its attention being called
                self.stack.enter_context(self.watched(path_of[mix.module], mix, "product"))
        for module, path in path_of.items():
            if isinstance(module, IntegerLayer):
                self.stack.enter_context(self.watched(path, module, "from_codes"))
                self.stack.enter_context(self.watched(path, module, "float_forward"))
            if isinstance(module, LowRankBranch):
                self.stack.enter_context(unfused(module))
            if isinstance(module, (*LEAVES, IntegerProduct, LowRankBranch)) or multiplies(module):
                self.stack.enter_context(self.watched(path, module, "forward"))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    @contextmanager
    def watched(self, path: str, module: Any, name: str) -> Iterator[None]:
        """While open, calls of `module.name` are at work under `path`."""
        former, own = getattr(module, name), name in module.__dict__

        def call(*args: Any, **kwargs: Any) -> Any:
            self.working.append(path)
            try:
                return former(*args, **kwargs)
            finally:
                self.working.pop()
                if isinstance(module, IntegerProduct):
                    self.reasons[path] = module.reason

        call.goes_along = True  # type: ignore[attr-defined]  # whatever way the module is gone by
        setattr(module, name, call)
        try:
            yield
        finally:
            if own:
                setattr(module, name, former)
            else:
                delattr(module, name)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]  # type: ignore[attr-defined]
        macs = multiply_accumulates(name, args, out)
        if macs:
            self.work[self.working[-1] if self.working else OUTSIDE][name] += macs
        return out

    def lines(self) -> Iterator[Line]:
        """In module order; what never ran has no multiplications."""
        for path, module in self.model.named_modules():
            if isinstance(module, IntegerLayer):
                yield self.line(path, "layer", self.work[path], module.spec.input is not None, module.reason)
            elif isinstance(module, IntegerEmbedding):
                yield Line(path, "layer", 0, False, False, "float", LOOKED_UP)
            elif isinstance(module, LowRankBranch):
                yield self.line(path, "layer", self.work[path], False, BESIDE)
            elif isinstance(module, LEAVES):
                yield self.line(path, "layer", self.work[path], False, NOT_PLANNED)
            elif isinstance(module, Tabled):
                yield Line(path, "layer", 0, False, False, "float", TABLED)
            elif multiplies(module):
                yield self.product(path, module)

    def product(self, path: str, attention: nn.Module) -> Line:
        """Of one attention, which may have multiplied beside the product that was put into it."""
        inner, own = f"{path}.product", self.work[path]
        if not isinstance(getattr(attention, "product", None), IntegerProduct):
            return self.line(path, "product", own, False, NOT_PLANNED)
        reason = INLINE if own else self.reasons.get(inner)
        return self.line(path, "product", own + self.work[inner], True, reason)

    @staticmethod
    def line(path: str, kind: str, work: Counter[str], planned: bool, reason: str | None) -> Line:
        integer = bool(work) and all(operation in INTEGER_OPS for operation in work)
        kernel = max(work, key=work.__getitem__) if integer else "float"
        why = None if integer else (reason or ASTRAY) if work else IDLE
        return Line(path, kind, work.total(), planned, integer, kernel, why)


@contextmanager
def apart(chain: Chain) -> Iterator[None]:
    """While open, layers that share one product have one each, so that each can be seen."""
    for joint in chain.joints:
        joint.joins = False
    try:
        yield
    finally:
        for joint in chain.joints:
            joint.joins = True


@contextmanager
def unfused(branch: LowRankBranch) -> Iterator[None]:
    """While open, its products run by themselves, so that they can be seen."""
    former, branch.fuses = branch.fuses, False
    try:
        yield
    finally:
        branch.fuses = former
