"""A latent U-Net of Stable Diffusion 1.5's block structure at a quarter of its width, against float and OpenVINO.

    python -m benchmarks.latent [batch,batch...] [seconds] [threads] [size]

Weights and inputs are random, ranges come from two calls: only the speed means anything. Contenders take turns; ratios
are to fp32 eager in its better layout. With one thread the clock is processor time, which a busy machine disturbs least.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from stepquant.artifact import Artifact, freeze
from stepquant.core.affine import scale_and_zero
from stepquant.core.ranges import minmax
from stepquant.evaluate.peers import peers_installed
from stepquant.evaluate.speed import best, calling, in_layouts, peer
from stepquant.fit.ranges import set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.quantizer import Quantizer
from stepquant.quant.schemes import scheme
from stepquant.runtime.coverage import coverage
from stepquant.runtime.lower import lower

CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (80, 160, 320, 320),
    "layers_per_block": 2,
    "attention_head_dim": 2,  # heads, by its old name: each 40 wide at the top, as in the original
    "cross_attention_dim": 192,
    "norm_num_groups": 16,
}


def arguments_of(batch: int, size: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": torch.randn(batch, 77, CONFIG["cross_attention_dim"], generator=generator),
    }


def calibrated(model: UNet2DConditionModel, size: int) -> Artifact:
    """w8a8 with the extremes of two random calls as ranges."""
    ends: dict[Quantizer, tuple[Tensor, Tensor]] = {}

    def observe(quantizer: Quantizer, seen: Tensor) -> None:
        low, high = ends.get(quantizer, (seen.min(), seen.max()))
        ends[quantizer] = low, high = torch.minimum(low, seen.min()), torch.maximum(high, seen.max())
        quantizer.set_range(*scale_and_zero(low, high, quantizer.grid))

    with torch.no_grad(), insert(Denoiser(model), scheme("w8a8"), split=False) as network:
        set_weight_ranges(network, minmax)
        for quantizer in network.quantizers():
            quantizer.observer = observe if quantizer.site.port != "weight" else None
        network.switch(weights=True, inputs=True)
        for seed in (1, 2):
            model(**arguments_of(1, size, seed))
        for quantizer in network.quantizers():
            quantizer.observer = None
        return freeze(network)


def turns(
    calls: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(next(iter(taken.values()))) < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    return taken


def main(batches: tuple[int, ...], seconds: float, threads: int, size: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = UNet2DConditionModel(**CONFIG).eval().requires_grad_(False)
    lowered = lower(copy.deepcopy(model), calibrated(model, size))
    found = coverage(lowered, arguments_of(1, size))
    print(f"{found.macs / 1e9:.2f} G multiplications, {found.share_of_all:.1%} of them in integers")
    for batch in batches:
        arguments = arguments_of(batch, size)
        entered = [
            best("fp32 eager", lambda given=arguments: in_layouts(model, given, torch.float32)),
            best("bf16 eager", lambda given=arguments: in_layouts(model, given, torch.bfloat16)),
        ]
        if peers_installed():
            data = [arguments_of(batch, size, seed) for seed in (1, 2)]
            entered.append(best("OpenVINO bf16", lambda given=arguments: peer(model, given, None)))
            entered.append(best("OpenVINO INT8", lambda given=arguments, data=data: peer(model, given, data)))
        calls = {one.name: one.call for one in entered if one.call is not None}
        calls["stepquant"] = calling(lowered, arguments)
        for call in calls.values():
            call(), call(), call()
        taken = turns(calls, seconds, time.process_time if threads == 1 else time.perf_counter)
        for name, times in taken.items():
            ratios = [own / reference for own, reference in zip(taken["fp32 eager"], times)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            print(
                f"batch {batch}  {name:14s} {1000 * statistics.median(times):9.1f} ms  "
                f"{middle:5.2f} ({low:.2f} to {high:.2f}) times fp32"
            )
        for one in entered:
            if one.call is None:
                print(f"batch {batch}  {one.name}: {one.unavailable}")


if __name__ == "__main__":
    words = sys.argv[1:]
    main(
        tuple(map(int, (words[0] if words else "1,2").split(","))),
        float(words[1]) if len(words) > 1 else 20.0,
        int(words[2]) if len(words) > 2 else torch.get_num_threads(),
        int(words[3]) if len(words) > 3 else CONFIG["sample_size"],
    )
