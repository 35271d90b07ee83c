"""What a branch of low rank costs beside the product of integers: python -m benchmarks.low_rank [float32].

Square linears, and one of FLUX's that reads its widest tokens, inputs quantized by the token; all in turns on one thread, by the
processor's clock, with one packed weight. `in a tensor` is the branch as two products of torch's that are added from a tensor of
their own, with factors in a pass of their own.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.rotation import layer, seconds
from stepquant.runtime import ops
from stepquant.runtime.layers.linear import IntegerLinear

SIZES = ((1152, 1152), (3072, 3072), (12288, 3072))
TURNS = {256: 31, 1024: 13, 4096: 5}  # by rows
RANKS = (16, 32, 64)
BALANCED = 32  # the rank that is measured with factors, too


def apart(made: IntegerLinear) -> IntegerLinear:
    """The same without what is fused."""
    made.low_rank.fuses = False
    made.balanced_codes = lambda x: made.codes_of(made.balanced(x))  # type: ignore[method-assign]
    return made


def layers(inputs: int, outputs: int) -> dict[str, IntegerLinear]:
    alone = layer(inputs, outputs)
    kernels, found = alone.prepared().kernels, {"alone": alone}
    for rank, balanced in (*((rank, False) for rank in RANKS), (BALANCED, True)):
        name = f"rank {rank}{' and factors' if balanced else ''}"
        first, second = (layer(inputs, outputs, rank=rank, balanced=balanced) for _ in range(2))
        found |= {name: first, f"{name}, in a tensor": apart(second)}
    for made in found.values():
        made.ready = replace(made.prepared(), kernels=kernels)
    return found


def turns_of(acts: dict[str, Callable[[], object]], count: int) -> list[dict[str, float]]:
    with torch.no_grad():
        return [{name: seconds(act) for name, act in acts.items()} for _ in range(count + 1)][1:]


def main() -> None:
    torch.set_num_threads(1)
    dtype = getattr(torch, sys.argv[1]) if sys.argv[1:] else torch.bfloat16
    print(f"times the linear alone: the fastest turns, (medians of turns); kernels: {ops.capability()}")
    for inputs, outputs in SIZES:
        made = layers(inputs, outputs)
        for rows, count in TURNS.items():
            x = torch.randn(rows, inputs).to(dtype)
            turns = turns_of({name: lambda m=m: m(x) for name, m in made.items()}, count)  # noqa: B023
            best = {name: min(turn[name] for turn in turns) for name in made}
            print(f"{inputs} to {outputs}, {rows} rows: alone {best['alone'] * 1e3:.2f} ms")
            for name in list(made)[1:]:
                middle = statistics.median(turn[name] / turn["alone"] for turn in turns)
                print(f"  {name}: {best[name] / best['alone']:.3f} ({middle:.3f})")


if __name__ == "__main__":
    main()
