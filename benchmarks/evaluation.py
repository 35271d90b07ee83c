"""What making an evaluation set costs: use of the processor and time beside the raw pipeline, and peak memory by size.

    python benchmarks/evaluation.py [--images 64] [--steps 50] [--batch 32] [--rounds 5] [--sizes 128,512]

Ours is `run` of this package, batch by batch, as `evaluate` and `compare` call it; raw is the pipeline called as its user
would, with the same seeds, batch and sampler. Both take turns in one process. Utilisation is processor seconds over wall
seconds and cores: on a machine with other work it says nothing. Memory: each size in a fresh process, images to disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stepquant.evaluate.metrics.classifiers import shipped_classifier
from stepquant.evaluate.metrics.measure import Batch, measure
from stepquant.job.compare import Evaluation
from stepquant.job.compare.tasks import batch_file, keep_batch, make_batch
from stepquant.job.memory import peak_bytes
from stepquant.job.pipelines import load
from stepquant.job.recipe import Recipe
from stepquant.models.sampling import generators, scheduler_of

Make = Callable[[int], Any]


def main() -> None:
    options = read_options()
    if options.memory_of:
        print(peak_of(options, options.memory_of))
        return
    torch.set_num_threads(options.threads)
    chosen = evaluation(options, options.images)
    pipeline, plain = load(options.model), load(options.model)
    plain.scheduler = scheduler_of(plain, options.sampler)
    recipe = Recipe.of(model=options.model)
    makers: dict[str, Make] = {
        "stepquant": lambda number: make_batch(pipeline, recipe, chosen, 0, number),
        "raw pipeline": lambda number: raw_batch(plain, chosen, number),
    }
    for make in makers.values():
        make(0)
    taken = turns(makers, chosen.batches, options.rounds)
    for name, rounds in taken.items():
        wall, used = (statistics.median(pair[side] for pair in rounds) for side in (0, 1))
        share = statistics.median(cpu / (seconds * options.threads) for seconds, cpu in rounds)
        print(
            f"{name:13s} {wall:8.2f} s, {used:8.2f} s of processors, {share:6.1%} of {options.threads} cores"
        )
    for side, what in enumerate(("time", "processor time")):
        ratios = [own[side] / raw[side] for own, raw in zip(*taken.values())]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(
            f"{what} of ours over raw: {middle:.3f} ({low:.3f} to {high:.3f}), {len(ratios)} rounds in turns"
        )
    for size in map(int, options.sizes.split(",")):
        print(f"{size:6d} images made and measured: peak {memory_in_a_process(size) / 1e6:.0f} MB")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="stepquant:characters", help="a float model, or the folder of an artifact")
    add("--images", type=int, default=64)
    add("--steps", type=int, default=50)
    add("--batch", type=int, default=32)
    add("--sampler", default="ddim")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--sizes", default="128,512", help="sizes of sets whose peak memory is measured")
    add("--memory-of", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def evaluation(options: argparse.Namespace, images: int) -> Evaluation:
    return Evaluation.of(images=images, steps=options.steps, batch=options.batch, sampler=options.sampler)


def raw_batch(pipeline: Any, chosen: Evaluation, number: int) -> Any:
    """Diffusers alone: the same seeds, images as a tensor's numbers."""
    noise = generators(chosen.seeds(0, number))
    return pipeline(
        batch_size=len(noise), generator=noise, num_inference_steps=chosen.steps, output_type="np"
    ).images


def turns(makers: dict[str, Make], batches: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of a whole set in each round, in an order that rotates."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    names = list(makers)
    for turn in range(max(rounds, 2)):
        for name in names[turn % 2 :] + names[: turn % 2]:
            start = time.perf_counter(), time.process_time()
            for number in range(batches):
                makers[name](number)
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return taken


def memory_in_a_process(size: int) -> int:
    words = [sys.executable, __file__, *sys.argv[1:], "--memory-of", str(size)]
    return int(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def peak_of(options: argparse.Namespace, size: int) -> int:
    """Peak memory of making a set and of all numbers about it: no more than a few batches are held."""
    torch.set_num_threads(options.threads)
    chosen, pipeline = evaluation(options, size), load(options.model)
    recipe, reader = Recipe.of(model=options.model), shipped_classifier().extractor()
    with tempfile.TemporaryDirectory() as folder:

        def batches() -> Any:
            for number in range(chosen.batches):
                images = make_batch(pipeline, recipe, chosen, 0, number)
                keep_batch(batch_file(Path(folder), number), images)
                yield Batch(images, images)

        measure(batches(), [reader])
    return peak_bytes()


if __name__ == "__main__":
    main()
