"""Where one call of a model spends its time, operation by operation, against what this machine can do at best."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepquant.runtime import ops
from stepquant.runtime.macs import Work, multiply_accumulates

REPEATS = 5


class Traffic(TorchDispatchMode):
    """Seconds of each operation, bytes that it reads and writes, and multiplications of those that multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        taken = time.perf_counter() - start
        name = func.name().partition(".")[0]
        self.calls[name] += 1
        self.seconds[name] += taken
        if not func.is_view:
            tensors = [
                t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and not t.is_mkldnn
            ]
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors)
            self.macs[name] += multiply_accumulates(name, args, out)
        return out


def breakdown(call: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of each operation in one call, with its GB/s and TOPS, beside the ceilings of this machine.

    `milliseconds` is the time of an untraced call; what exceeds the sum of its operations is Python and dispatch.
    """
    call(), call(), call()
    total = fastest(call) * 1000
    with Traffic() as traffic:
        for _ in range(REPEATS):
            call()
    rows = [one_row(name, traffic) for name in traffic.calls]
    rows.sort(key=lambda row: -row["milliseconds"])
    traced = sum(row["milliseconds"] for row in rows)
    for row in rows:
        row["share"] = row["milliseconds"] / traced
    return {"milliseconds": total, "operations_milliseconds": traced, "ceilings": ceilings(), "rows": rows}


def one_row(name: str, traffic: Traffic) -> dict[str, Any]:
    seconds, moved, macs = (counter[name] for counter in (traffic.seconds, traffic.bytes, traffic.macs))
    return {
        "name": name,
        "calls": traffic.calls[name] / REPEATS,
        "milliseconds": seconds * 1000 / REPEATS,
        "gigabytes_per_second": moved / seconds / 1e9 if moved else None,
        "tera_operations_per_second": 2 * macs / seconds / 1e12 if macs else None,
    }


def ceilings() -> dict[str, float]:
    """Measured here and now: bytes copied in a second, and operations of a large product of bytes."""
    source = torch.zeros(1 << 26, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = fastest(lambda: target.copy_(source))
    found = {"gigabytes_per_second": 2 * source.numel() / copied / 1e9}
    call = integer_product()
    if call is not None:
        with Work() as work:
            call()
        found["tera_operations_per_second"] = 2 * work.macs.total() / fastest(call) / 1e12
    return found


def integer_product() -> Callable[[], Any] | None:
    """A product of bytes large enough to hide what surrounds it."""
    if not ops.compiled():
        return None
    rows, width = 4096, 512
    weight = torch.ones(width, width, 1, 1, dtype=torch.int8)
    product = ops.Product.of(weight, torch.ones(width), None)
    codes = torch.zeros(rows, width, dtype=torch.uint8)
    return lambda: product.linear(codes, ops.Code(1.0), torch.bfloat16)


def fastest(call: Callable[[], Any], rounds: int = 8) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)
