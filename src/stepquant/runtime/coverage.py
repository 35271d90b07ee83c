"""What really ran in integers: every layer and product of one traced forward pass, with its multiplications."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.models.families.roles import LEAVES, PRODUCTS
from stepquant.runtime.blocks.chain import Chain, chains
from stepquant.runtime.blocks.install import forget_kept
from stepquant.runtime.device import operations
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.layer import IntegerLayer

INTEGER_OPS = operations()
NOT_PLANNED = "the plan keeps it in float"


@dataclass(frozen=True)
class Line:
    """One layer or attention product. `planned` means that the plan gives all its operands a grid."""

    path: str
    kind: str  # layer or product
    macs: int
    planned: bool
    integer: bool
    kernel: str
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

    def to_json(self) -> dict[str, Any]:
        totals = {
            "macs": self.macs,
            "share_of_planned": self.share_of_planned,
            "share_of_all": self.share_of_all,
        }
        return totals | {"lines": [asdict(line) for line in self.lines]}


def coverage(model: nn.Module, arguments: Mapping[str, Any]) -> Coverage:
    """Run `model(**arguments)` once and see which kernels each layer and product reached."""
    forget_kept(model)
    with Trace(model) as trace, torch.no_grad():
        model(**arguments)
    return Coverage(tuple(trace.lines()))


class Trace(TorchDispatchMode):
    """Which operations ran while each layer or product was at work, and how much it multiplied."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.working: list[str] = []
        self.ran: dict[str, Counter[str]] = {}
        self.macs: Counter[str] = Counter()
        self.float_products: Counter[str] = Counter()
        self.stack = ExitStack()

    def __enter__(self) -> Trace:
        for chain in chains(self.model):
            self.stack.enter_context(apart(chain))
        for path, module in self.model.named_modules():
            if isinstance(module, IntegerLayer):
                self.stack.enter_context(self.watched(path, module, "from_codes"))
                self.stack.enter_context(self.watched(path, module, "float_forward"))
            if isinstance(module, (*LEAVES, IntegerProduct, *PRODUCTS)):
                self.stack.enter_context(self.watched(path, module, "forward"))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    @contextmanager
    def watched(self, path: str, module: nn.Module, name: str) -> Iterator[None]:
        """While open, calls of `module.name` are at work under `path`."""
        former, own = getattr(module, name), name in module.__dict__

        def call(*args: Any, **kwargs: Any) -> Any:
            self.working.append(path)
            try:
                out = former(*args, **kwargs)
            finally:
                self.working.pop()
            self.macs[path] += multiplications(module, args, out)
            return out

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
        name = func.name().partition(".")[0]  # type: ignore[attr-defined]
        if self.working:
            self.ran.setdefault(self.working[-1], Counter())[name] += 1
            if "scaled_dot_product" in name:
                self.float_products[self.working[-1]] += product_size(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def lines(self) -> Iterator[Line]:
        """In module order; what never ran has no multiplications."""
        for path, module in self.model.named_modules():
            kernel = next((op for op in INTEGER_OPS if self.ran.get(path, Counter())[op]), "")
            if isinstance(module, IntegerLayer):
                planned = module.spec.input is not None
                yield Line(
                    path,
                    "layer",
                    self.macs[path],
                    planned,
                    bool(kernel),
                    kernel or "float",
                    self.why(path, module, kernel),
                )
            elif isinstance(module, IntegerProduct):
                owner = path.rpartition(".")[0]
                yield Line(
                    owner,
                    "product",
                    self.macs[path],
                    True,
                    bool(kernel),
                    kernel or "float",
                    self.why(path, module, kernel),
                )
            elif isinstance(module, LEAVES):
                yield Line(path, "layer", self.macs[path], False, False, "float", NOT_PLANNED)
            elif isinstance(module, PRODUCTS) and self.float_products[path]:
                yield Line(path, "product", self.float_products[path], False, False, "float", NOT_PLANNED)

    def why(self, path: str, module: IntegerLayer | IntegerProduct, kernel: str) -> str | None:
        if kernel:
            return None
        if path not in self.ran:
            return "it did not run in this pass"
        return module.reason or "no integer kernel was reached: a mask, or another device"


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


def multiplications(module: nn.Module, args: tuple[Any, ...], out: Any) -> int:
    if isinstance(module, IntegerLayer):
        return int(out.numel() * module.weight_shape[1:].numel())
    if isinstance(module, LEAVES):
        return int(out.numel() * module.weight[0].numel())
    return product_size(args[0], args[1]) if isinstance(module, IntegerProduct) else 0


def product_size(query: Tensor, key: Tensor) -> int:
    """Both products of attention: query with key, and probabilities with value."""
    return 2 * query.numel() * key.shape[-2]
