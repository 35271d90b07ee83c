"""One pass over a float pipeline and its quantized twin: everything about quality, as plain JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from stepquant.calib.record import trajectory_seed
from stepquant.errors import EvaluationError, StepquantError
from stepquant.evaluate.cost import cost, coverage
from stepquant.evaluate.data import CIFAR10, read_data
from stepquant.evaluate.describe import (
    describe_float,
    describe_plan,
    describe_quantized,
    encode,
    environment,
)
from stepquant.evaluate.features import Extractor, embedded_extractor
from stepquant.evaluate.metrics import (
    NEEDS_WEIGHTS,
    SAME_SEEDS,
    Batch,
    Measured,
    Number,
    measure,
    pair_number,
    unavailable,
)
from stepquant.evaluate.pairs import PAIR_METRICS
from stepquant.evaluate.probe import trace
from stepquant.evaluate.sets import Target, set_numbers
from stepquant.evaluate.speed import first_arguments
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import run
from stepquant.progress import Progress, Silent

FORMAT = 1
# Trajectories of calibration are numbered from 0; those of evaluation never meet them, nor each other.
FIRST_SEED, FIRST_OTHER_SEED = 400_000, 700_000
MOST_IMAGES = FIRST_OTHER_SEED - FIRST_SEED


def evaluate(
    float_pipeline: Any,
    quantized_pipeline: Any,
    *,
    images: int = 1024,
    steps: int = 50,
    sampler: str | None = None,
    seed: int = 0,
    batch: int = 32,
    prompts: Sequence[str] | None = None,
    data: str | None = None,
    floor: bool = True,
    shown: int = 16,
    probed: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Results up to `images` in the schema of this package.

    data: what the model was trained on, 'cifar10' or a folder of images; None leaves the distance to data out.
    floor: also generate as many images from other seeds with the float model, for the noise floor.
    shown, probed: images kept in the results, and trajectories followed step by step.
    """
    check_count(images, steps)
    progress, source, other = (
        progress or Silent(),
        Denoiser.of(float_pipeline),
        Denoiser.of(quantized_pipeline),
    )
    check_twins(source, other)
    asked = {"sampler": sampler or type(float_pipeline.scheduler).__name__, "steps": steps}
    asked |= {"seed": seed, "images": images, "batch": batch}
    seeds = [trajectory_seed(seed, FIRST_SEED + i) for i in range(images)]
    others = [trajectory_seed(seed, FIRST_OTHER_SEED + i) for i in range(images)] if floor else None
    traced = trace(
        float_pipeline, quantized_pipeline, seeds[:probed], steps=steps, sampler=sampler, prompts=prompts
    )
    batches = generate(
        (float_pipeline, quantized_pipeline), seeds, others, (steps, sampler, prompts), batch, progress
    )
    first = next(batches)
    size = first.float.shape[-2:]
    extractor, why = find_extractor(size)
    measured = measure(chain([first], batches), extractor, keep=shown)
    covered = coverage(source, other, first_arguments(float_pipeline, 1, prompts))
    return {
        "format": FORMAT,
        "float": describe_float(float_pipeline),
        "quantized": describe_quantized(quantized_pipeline),
        "sampling": asked | {"calls": len(traced.steps), "size": list(size)},
        "environment": environment(),
        "quality": [number.to_json() for number in numbers(measured, extractor, why, data)],
        "steps": traced.steps,
        "blocks": traced.blocks,
        "inputs": traced.inputs,
        "images": show(seeds, measured),
        "coverage": covered,
        "cost": cost(covered),
        "plan": describe_plan(source, other),
    }


def show(seeds: Sequence[int], measured: Measured) -> dict[str, Any]:
    """The images that were kept, with their seeds."""
    ours, theirs = ([encode(image) for image in kept] for kept in measured.shown)
    return {"seeds": list(seeds[: len(ours)]), "float": ours, "quantized": theirs}


def check_twins(source: Denoiser, other: Denoiser) -> None:
    if source.model is other.model:
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
    pipelines: tuple[Any, Any],
    seeds: Sequence[int],
    others: Sequence[int] | None,
    sampling: tuple[int, str | None, Sequence[str] | None],
    batch: int,
    progress: Progress,
) -> Iterator[Batch]:
    """The same seeds from both pipelines, batch by batch, and the other seeds from the first one."""
    starts = range(0, len(seeds), batch)
    for start in progress.track(starts, "generating with both models", len(starts)):
        some = seeds[start : start + batch]
        yield Batch(
            run(pipelines[0], some, *sampling),
            run(pipelines[1], some, *sampling),
            None if others is None else run(pipelines[0], others[start : start + batch], *sampling),
        )


def find_extractor(size: Sequence[int]) -> tuple[Extractor | None, str]:
    """The feature network that reads images of this size, or the reason why there is none."""
    try:
        extractor = embedded_extractor()
    except StepquantError as error:
        return None, str(error.what)
    if tuple(size) != (extractor.size, extractor.size):
        return (
            None,
            f"its network reads {extractor.size}x{extractor.size} images, these are {size[0]}x{size[1]}",
        )
    return extractor, ""


def numbers(measured: Measured, extractor: Extractor | None, why: str, data: str | None) -> list[Number]:
    """Likeness of pairs first, then distances between sets, then what cannot be measured here and why."""
    out = [pair_number(metric, measured) for metric in PAIR_METRICS]
    if extractor is None:
        out.append(unavailable("FD-C10", SAME_SEEDS, why))
    else:
        target, missing = find_data(extractor, data)
        out += set_numbers(extractor, measured, target)
        out += [] if target else [unavailable(extractor.name, "data", missing)]
    return out + [unavailable(name, SAME_SEEDS, reason) for name, reason in NEEDS_WEIGHTS.items()]


def find_data(extractor: Extractor, source: str | None) -> tuple[Target | None, str]:
    """What to compare with, or why there is nothing; a folder that was asked for must be there."""
    try:
        return read_data(source, extractor), ""
    except EvaluationError as error:
        if source is not None and source != CIFAR10:
            raise
        return None, str(error.what)
