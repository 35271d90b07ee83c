"""`evaluate`: images of a float pipeline and of its quantized twin from the same seeds, and all quality numbers as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from stepquant.calib.record import trajectory_seed
from stepquant.errors import EvaluationError
from stepquant.evaluate.cost import cost, coverage
from stepquant.evaluate.describe import (
    describe_float,
    describe_plan,
    describe_quantized,
    encode,
    environment,
)
from stepquant.evaluate.metrics.instruments import Weights, load_networks
from stepquant.evaluate.metrics.measure import Batch, Measured
from stepquant.evaluate.metrics.media import picture_of
from stepquant.evaluate.metrics.quality import judge
from stepquant.evaluate.several import named
from stepquant.evaluate.trajectory.joined import traces
from stepquant.evaluate.trajectory.probe import trace
from stepquant.evaluate.twins import Twins
from stepquant.models.call import Call, texts
from stepquant.models.generate import asked_of, run, words_of
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent

FORMAT = 1
# Trajectories of calibration are numbered from 0; those of evaluation never meet them, nor each other.
FIRST_SEED, FIRST_OTHER_SEED = 400_000, 700_000
MOST_IMAGES = FIRST_OTHER_SEED - FIRST_SEED


def evaluate(
    twins: Twins,
    sampling: Sampling,
    *,
    images: int = 1024,
    seed: int = 0,
    batch: int = 32,
    data: str | None = None,
    floor: bool = True,
    shown: int = 16,
    probed: int = 16,
    weights: Weights | None = None,
    stored: Iterable[Batch] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Results up to `images` in the schema of this package.

    data: what the model was trained on: 'characters' or 'cifar10', a folder of images or a file of statistics; None
        leaves the distance to data out.
    floor: also generate as many images from other seeds with the float model, for the noise floor.
    shown, probed: images kept in the results, and trajectories followed step by step.
    weights: of the networks of FID, LPIPS and CLIP score, a classifier, and parts that images are composed of.
    stored: the images of these seeds, where they were generated before.
    """
    check_count(images, sampling.steps)
    progress = progress or Silent()
    check_twins(twins)
    prompted = bool(texts(words_of(twins.float, sampling)))
    networks = load_networks(weights or Weights(), data, prompted=prompted)
    asked = {"sampler": sampling.sampler or type(twins.float.scheduler).__name__, "steps": sampling.steps}
    asked |= {"seed": seed, "images": images, "batch": batch}
    seeds = [trajectory_seed(seed, FIRST_SEED + i) for i in range(images)]
    others = [trajectory_seed(seed, FIRST_OTHER_SEED + i) for i in range(images)] if floor else None
    # A call that is written out is a trajectory of its own: one of them is followed.
    written = any(isinstance(one, Call) for one in sampling.prompts)
    parts = twins.by_denoiser()
    followed = seeds[: 1 if written else probed]
    traced = traces([(one.source.component, trace(one, followed, sampling)) for one in parts])
    batches = generate(twins, seeds, others, sampling, batch, progress) if stored is None else iter(stored)
    judged = judge(batches, networks, data, prompted=prompted, keep=shown)
    covered = named([(one.source.component, covered_by(one, sampling)) for one in parts])
    return {
        "format": FORMAT,
        "float": describe_float(twins.float),
        "quantized": describe_quantized(twins.quantized),
        "sampling": asked | {"calls": len(traced.steps), "size": list(judged.size), "medium": judged.medium},
        "environment": environment(),
        "quality": [number.to_json() for number in judged.numbers],
        "portions": [asdict(portion) for portion in judged.portions],
        "steps": traced.steps,
        "blocks": traced.blocks,
        "inputs": traced.inputs,
        "times": traced.times,
        "images": show(seeds, judged.measured),
        "coverage": covered,
        "cost": cost(covered),
        "plan": named([(one.source.component, describe_plan(one.source, one.other)) for one in parts]),
    }


def covered_by(twins: Twins, sampling: Sampling) -> list[dict[str, Any]]:
    """What the first call of a denoiser runs in integers."""
    arguments = first_arguments(twins.float, 1, sampling.prompts, twins.quantized)
    return coverage(twins.source, twins.other, arguments)


def show(seeds: Sequence[int], measured: Measured) -> dict[str, Any]:
    """The images that were kept, with their seeds."""
    ours, theirs = ([encode(picture_of(sample)) for sample in kept] for kept in measured.shown)
    return {"seeds": list(seeds[: len(ours)]), "float": ours, "quantized": theirs}


def check_twins(twins: Twins) -> None:
    if twins.source.model is twins.other.model:
        raise EvaluationError(
            "both pipelines hold the same denoiser",
            fix="load the float model again: quantizing works in place",
        )


def check_count(images: int, steps: int) -> None:
    if not 2 <= images <= MOST_IMAGES:
        raise EvaluationError(
            "the number of images must allow a mean and a spread", got=images, expected=f"2 to {MOST_IMAGES}"
        )
    if steps < 1:
        raise EvaluationError(
            "sampling needs at least one step", got=steps, fix="give --steps a positive number"
        )


def generate(
    twins: Twins,
    seeds: Sequence[int],
    others: Sequence[int] | None,
    sampling: Sampling,
    batch: int,
    progress: Progress,
) -> Iterator[Batch]:
    """The same seeds from both pipelines, batch by batch, and the other seeds from the first one."""
    starts = range(0, len(seeds), batch)
    for start in progress.track(starts, "generating with both models", len(starts)):
        some, rest = seeds[start : start + batch], (others or ())[start : start + batch]
        yield Batch(
            run(twins.float, some, sampling),
            run(twins.quantized, some, sampling),
            run(twins.float, rest, sampling) if rest else None,
            texts(asked_of(twins.float, some, sampling)),
            texts(asked_of(twins.float, rest, sampling)),
        )
