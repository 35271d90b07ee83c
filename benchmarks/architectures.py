"""Well-known networks with random weights, in integers against float and OpenVINO: only the speed means anything.

    python -m benchmarks.architectures ddpm --batch 1,8,32
    python -m benchmarks.architectures dit-xl --batch 1,2 --threads 1 --dtype fp32
    python -m benchmarks.architectures vae --batch 1 --size 64
    python -m benchmarks.architectures vae --size 128 --peak --tiled
    python -m benchmarks.architectures latent --threads 1 --schemes w8a8,w8a8-dynamic

Ranges come from two random calls. Contenders take turns; ratios are to fp32 eager in its better layout. With one thread
the clock is processor time, which a busy machine disturbs least. The last lines say which operations the quantized
network spends its time in. `vae` is the decoder of Stable Diffusion 1.5, its size that of the latents; `--peak` says what
memory one call takes beyond the weights, in float and in integers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import ARCHITECTURES
from stepquant.artifact import Artifact
from stepquant.core.affine import scale_and_zero
from stepquant.core.ranges import minmax
from stepquant.core.slices import Slices
from stepquant.evaluate.speed.breakdown import breakdown
from stepquant.evaluate.speed.calls import (
    QUANTIZED,
    REFERENCE,
    Contender,
    best,
    calling,
    compiled_in_layouts,
    fastest_type,
    in_layouts,
    peer,
)
from stepquant.evaluate.speed.peers import peers_installed
from stepquant.evaluate.speed.turns import interleave, summarize
from stepquant.fit.extremes import fit_extremes
from stepquant.fit.ranges import set_weight_ranges
from stepquant.job.memory import peak_bytes, reset_peak, resident_bytes
from stepquant.job.parts import plan_for_parts
from stepquant.models.denoiser import Denoiser
from stepquant.models.part import Part, Received, seen_by
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.quantizer import Quantizer
from stepquant.quant.schemes import scheme
from stepquant.runtime.coverage import coverage
from stepquant.runtime.lower import lower

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHOWN = 8  # operations
LONG = 1.0  # seconds of a call


class Decoding(nn.Module):
    """What pipelines call of an autoencoder."""

    def __init__(self, coder: Any) -> None:
        super().__init__()
        self.coder = coder

    def forward(self, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return self.coder.decode(sample, return_dict=False)  # type: ignore[no-any-return]


def decoding_in_integers(coder: Any, calls: list[dict[str, Any]]) -> Decoding:
    """w8a8 with the extremes of these calls as ranges."""
    received = [Received("decode", (one["sample"],), {"return_dict": False}) for one in calls]
    part = seen_by(Part(coder, "vae"), received)
    artifact = fit_extremes(part, plan_for_parts(scheme("w8a8")), [{"call": one} for one in received])
    return Decoding(lower(copy.deepcopy(coder), artifact))


def calibrated(model: Any, calls: list[dict[str, Any]], name: str = "w8a8") -> Artifact:
    """A scheme with the extremes of these calls as ranges, where it has any."""
    ends: dict[Quantizer, tuple[Tensor, Tensor]] = {}

    def observe(quantizer: Quantizer, seen: Slices) -> None:
        low, high = ends.get(quantizer, seen.ends)
        ends[quantizer] = low, high = torch.minimum(low, seen.ends[0]), torch.maximum(high, seen.ends[1])
        quantizer.set_range(*scale_and_zero(low, high, quantizer.grid))

    with torch.no_grad(), insert(Denoiser(model), scheme(name), split=False) as network:
        set_weight_ranges(network, minmax)
        for quantizer in network.ranged():
            quantizer.observer = observe
        network.switch(weights=True, inputs=True)
        for arguments in calls if network.ranged() else ():
            model(**arguments)
        for quantizer in network.ranged():
            quantizer.observer = None
        return freeze(network)


def beside(model: nn.Module) -> nn.Module:
    """A copy that shares the memory of tensors, as long as nobody gives it others."""
    own: dict[int, Any] = {id(table): table for table in model.buffers()}
    own |= {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, own)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", choices=ARCHITECTURES)
    add("--batch", default="1,2", help="batch sizes")
    add("--size", type=int, help="pixels or latents of a side; its own by default")
    add("--seconds", type=float, default=20.0, help="for each batch size")
    add("--dtype", choices=DTYPES, default="bf16", help="of what runs between the quantized network's layers")
    add("--schemes", default="w8a8", help="several in turns; autoencoders have w8a8 alone")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--rounds", type=int, default=5, help="at least so many turns")
    add("--tiled", action="store_true", help="autoencoders decode in tiles")
    add("--peak", action="store_true", help="memory of one call instead of its time")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    one = ARCHITECTURES[options.name]
    size = options.size or one.size
    model = one.make()
    seen = [one.arguments(1, size, seed) for seed in (1, 2)]
    made: dict[str, Any] = {}
    if one.kind == "AutoencoderKL":
        if options.tiled:
            model.enable_tiling()
        made[QUANTIZED] = decoding_in_integers(model, [cut(given) for given in seen])
        model = Decoding(model)
    else:
        for name in options.schemes.split(","):
            artifact = calibrated(model, seen, name)
            label = f"{QUANTIZED}, {name}" if made else QUANTIZED
            made[label] = lower(beside(model), artifact, DTYPES[options.dtype])
    if options.peak:
        return show_peaks({REFERENCE: model} | made, one.arguments(1, size))
    for name, lowered in made.items():
        covered = coverage(lowered, one.arguments(1, size))
        print(f"{name}: {covered.macs / 1e9:.2f} G multiplications, {covered.share_of_all:.1%} in integers")
    for batch in map(int, options.batch.split(",")):
        arguments = one.arguments(batch, size)
        entered = baselines(model, arguments, options.compile)
        if peers_installed():
            entered += peers(model, arguments, [one.arguments(batch, size, seed) for seed in (1, 2)])
        calls = {entry.name: entry.call for entry in entered if entry.call is not None}
        quantized = {name: calling(lowered, arguments) for name, lowered in made.items()}
        calls |= quantized
        clock = time.process_time if options.threads == 1 else time.perf_counter
        begin = clock()
        for call in calls.values():
            call()
        long = clock() - begin > LONG * len(calls)  # whose caches hold nothing of the call before
        for call in (*quantized.values(), *quantized.values()):
            call()
        rounds = interleave(calls, options.seconds, options.rounds, untimed=0 if long else 1, clock=clock)
        for name in calls:
            found = summarize(rounds, name, REFERENCE)
            print(
                f"batch {batch}  {name:24s} {found['milliseconds']:9.1f} ms  "
                f"{found['ratio']:5.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f}) times fp32"
            )
        for entry in entered:
            if entry.call is None:
                print(f"batch {batch}  {entry.name}: {entry.unavailable}")
        for name, call in quantized.items():
            print(f"batch {batch}  {name}:")
            for row in breakdown(call)["rows"][:SHOWN]:
                rate = row["tera_operations_per_second"]
                rate = "" if rate is None else f"{rate:6.3f} TOPS"
                print(
                    f"batch {batch}  {row['share']:6.1%}  {row['milliseconds']:9.1f} ms  {row['name']}  {rate}"
                )


def cut(arguments: dict[str, Any]) -> dict[str, Any]:
    """A corner of the latents: ranges need no more."""
    return {"sample": arguments["sample"][..., :16, :16]}


def show_peaks(models: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Bytes that a second call has resident at its peak beyond what was there before it; weights stay out of it."""
    for name, model in models.items():
        call = calling(model, arguments)
        call()
        gc.collect()
        before = resident_bytes()
        reset_peak()
        call()
        print(f"{name}: {(peak_bytes() - before) / 1e6:.0f} MB")


def baselines(model: Any, arguments: dict[str, Any], compiled: bool) -> list[Contender]:
    """fp32 eager, and torch in this machine's fastest type."""
    fast = fastest_type()
    entered = [best(REFERENCE, lambda: in_layouts(model, arguments, torch.float32))]
    if fast != torch.float32:
        entered.append(best("bf16 eager", lambda: in_layouts(model, arguments, fast)))
    if compiled:
        entered.append(best("compiled", lambda: compiled_in_layouts(model, arguments, fast)))
    return entered


def peers(model: Any, arguments: dict[str, Any], data: list[dict[str, Any]]) -> list[Contender]:
    fast = fastest_type()
    return [
        best("OpenVINO float", lambda: peer(model, arguments, fast)),
        best("OpenVINO INT8", lambda: peer(model, arguments, fast, data)),
    ]


if __name__ == "__main__":
    main(read_options())
