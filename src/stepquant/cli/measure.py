"""Commands that measure: evaluate, benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant import hub
from stepquant.cli.benchmark import Chart, Generation, Profile, beside_calls, draw, show_speed
from stepquant.cli.options import (
    AnyModel,
    ArtifactFolder,
    Calls,
    Classifier,
    Clip,
    Data,
    Device,
    Inception,
    Json,
    Lpips,
    Prompts,
    Quiet,
    Sampler,
    Seed,
    Steps,
    Truth,
    read_asked,
)
from stepquant.cli.screen import Screen, command_text
from stepquant.cli.show import integer_shares, shares_text
from stepquant.cli.words import read_counts
from stepquant.job import load
from stepquant.models.denoiser import Denoiser

Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The float model it was made of; a model of your own by its folder.",
        show_default="the embedded one that the artifact names",
    ),
]


def evaluate(
    folder: ArtifactFolder,
    against: Against = None,
    images: Annotated[
        int, typer.Option(min=2, metavar="N", help="Pairs of images from the same seeds.")
    ] = 1024,
    steps: Steps = None,
    sampler: Sampler = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 32,
    data: Data = None,
    inception: Inception = None,
    lpips: Lpips = None,
    clip: Clip = None,
    classifier: Classifier = None,
    truth: Truth = None,
    floor: Annotated[
        bool,
        typer.Option(help="Also measure what two seeds of the float model differ by: half as long again."),
    ] = True,
    prompts: Prompts = None,
    calls: Calls = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure quality against the float model, seed by seed and step by step; keeps it in DIR/results.json."""
    from stepquant.evaluate.metrics.instruments import Weights
    from stepquant.job.results import evaluate_artifact

    screen = Screen(quiet)
    screen.warn_if_plain()
    options: dict[str, Any] = {
        "steps": steps,
        "sampler": sampler,
        "prompts": read_asked(prompts, calls),
        "images": images,
        "batch": batch,
        "floor": floor,
        "seed": seed,
        "weights": Weights(inception, lpips, clip, classifier, truth),
    }
    options |= {} if data is None else {"data": data}
    with screen.reporter as progress:
        results = evaluate_artifact(folder, against, device=device, progress=progress, **options)
    show_table(screen, results)
    screen.say(f"next: {command_text(['report', str(folder)])}")
    screen.finish(json, results)


def benchmark(
    model: AnyModel,
    against: Against = None,
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="Batch sizes.")] = "1,8,32",
    seconds: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Timing per batch size, after warming up.")
    ] = 10.0,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="For everyone.", show_default="all")
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Also time torch.compile, which takes minutes to build."),
    ] = True,
    generation: Generation = 0,
    profile: Profile = False,
    chart: Chart = None,
    prompts: Prompts = None,
    calls: Calls = None,
    device: Device = "cpu",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Time one call of the denoiser, in turns with float ones, eager and compiled; keeps it in DIR/results.json."""
    from stepquant.evaluate import benchmark as time_float
    from stepquant.evaluate.speed.calls import baselines_here
    from stepquant.job.results import benchmark_artifact

    screen = Screen(quiet)
    options: dict[str, Any] = {
        "batches": read_counts(batch, "--batch"),
        "seconds": seconds,
        "count": threads,
        "baselines": baselines_here(compiled),
        "prompts": read_asked(prompts, calls),
    }
    pipeline = load(model, device)
    with screen.reporter as progress:
        if hub.config_of(Denoiser.of(pipeline).model) is None:
            result: dict[str, Any] = {"speed": time_float(pipeline, progress=progress, **options)}
        else:
            screen.warn_if_plain()
            result = benchmark_artifact(Path(model), against, device=device, progress=progress, **options)
    show_speed(screen, result["speed"])
    if "coverage" in result:
        screen.show(shares_text(integer_shares(result["coverage"])))
    result = {**result, **beside_calls(screen, model, against, generation, profile, options)}
    draw(screen, result["speed"], chart)
    screen.finish(json, result)


def show_table(screen: Screen, results: Mapping[str, Any]) -> None:
    """The headline rows of the report."""
    from stepquant.report import table

    header, *rows = table(results)
    screen.table("", header, rows)


COMMANDS: Mapping[str, Callable[..., None]] = {"evaluate": evaluate, "benchmark": benchmark}
