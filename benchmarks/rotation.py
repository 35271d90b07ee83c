"""What rotating inputs costs beside the product of integers: python -m benchmarks.rotation.

Linears of FLUX's widths, inputs quantized by the token; all in turns on one thread, by the processor's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.hub.on_load import rounded
from stepquant.runtime import ops
from stepquant.runtime.layers.linear import IntegerLinear

WIDTHS = ((3072, 3072), (3072, 12288), (12288, 3072))
ROWS, GROUP, TURNS = 512, 256, 9
WEIGHT, INPUT = Grid.parse("int8/channel"), Grid.parse("int8/token")


def layer(
    inputs: int, outputs: int, rotation: int = 0, rank: int = 0, balanced: bool = False
) -> IntegerLinear:
    spec = LayerSpec(WEIGHT, INPUT, rotation=rotation, rank=rank, balanced=balanced)
    made = IntegerLinear(nn.Linear(inputs, outputs), spec)
    for name, value in rounded(torch.randn(outputs, inputs) / inputs**0.5, spec).items():
        made._buffers[name] = value
    made.emit = torch.bfloat16
    made.prepared()
    return made


def seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"{ROWS} rows, groups of {GROUP}, medians of {TURNS} turns; C++ kernels: {ops.compiled()}")
    for inputs, outputs in WIDTHS:
        x = torch.randn(ROWS, inputs).bfloat16()
        plain, turned = (layer(inputs, outputs, rotation) for rotation in (0, GROUP))
        acts = {
            "plain": lambda: plain(x),  # noqa: B023, called at once
            "rotated": lambda: turned(x),  # noqa: B023
            "codes": lambda: plain.codes_of_rows(x),  # noqa: B023
            "rotated codes": lambda: turned.codes_of_rows(x),  # noqa: B023
        }
        with torch.no_grad():
            turns = [{name: seconds(act) for name, act in acts.items()} for _ in range(TURNS + 1)][1:]
        spent = {name: statistics.median(turn[name] for turn in turns) * 1e3 for name in acts}
        print(
            f"{inputs} to {outputs}: {spent['plain']:.1f} ms; codes alone {spent['codes']:.2f} and, rotated, "
            f"{spent['rotated codes']:.2f} ms"
        )
        ratios = sorted(turn["rotated"] / turn["plain"] for turn in turns)
        print(
            f"  rotated {spent['rotated']:.1f} ms: {statistics.median(ratios):.3f} times "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
