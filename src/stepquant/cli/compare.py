"""The command that compares: methods, schemes and seeds in a grid of runs that survives anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepquant.cli.interrupt import keeping
from stepquant.cli.options import (
    DEFAULT_MODEL,
    Calls,
    Classifier,
    Clip,
    Data,
    Device,
    Inception,
    Json,
    Lpips,
    Model,
    Prompts,
    Quiet,
    Sampler,
    Settings,
    Truth,
    read_asked,
    read_settings,
)
from stepquant.cli.screen import Screen
from stepquant.errors import StepquantError, UnknownNameError
from stepquant.models.call import Asked, Call, steps_of
from stepquant.progress import Progress

if TYPE_CHECKING:
    from stepquant.job.compare import Compared

COUNT = 50  # denoising steps of images where nobody asks for another number
EXECUTORS = ("processes", "inline", "ray")

Methods = Annotated[
    str, typer.Option(metavar="NAME,NAME,...", help="See `stepquant methods`; a+b for composed ones.")
]
Schemes = Annotated[str, typer.Option(metavar="NAME,NAME,...", help="See `stepquant schemes`.")]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        metavar="NAME:KEY=VALUE,...",
        help="A row with settings of its own, repeatable, as minmax:samples=64.",
    ),
]
Seeds = Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each with seeds 0 to N-1.")]
Images = Annotated[int, typer.Option(min=2, metavar="N", help="Images of each cell, and of the float model.")]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Denoising steps of those images.",
        show_default="50, or those of the calls",
    ),
]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")]
CalibrationSteps = Annotated[
    int | None,
    typer.Option(
        "--calibration-steps",
        min=1,
        metavar="N",
        help="Denoising steps of the calibration.",
        show_default="as --steps",
    ),
]
Speed = Annotated[
    float, typer.Option(min=0, metavar="S", help="Seconds of timing beside fp32 for each cell; 0: none.")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pages and the run store.")]
StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR", help="Run store that several comparisons share.", show_default="DIR"
    ),
]
Kind = Annotated[str, typer.Option("--executor", metavar="NAME", help=f"{', '.join(EXECUTORS)}.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tasks at once.", show_default="1; a cluster's cores with ray"),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Of each task; the same bytes on another machine need the same number.",
        show_default="the cores' share of a worker; 1 with ray",
    ),
]
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Of the Ray cluster.", show_default="a new local one")
]
AnyCode = Annotated[
    bool,
    typer.Option("--any-code", help="Keep finished cells that another version of the code made."),
]


def compare(
    model: Model = DEFAULT_MODEL,
    methods: Methods = "",
    schemes: Schemes = "w8a8,w4a8",
    variant: Variants = None,
    seeds: Seeds = 1,
    images: Images = 2048,
    steps: Steps = None,
    batch: Batch = 32,
    calibration_steps: CalibrationSteps = None,
    sampler: Sampler = None,
    settings: Settings = None,
    data: Data = None,
    inception: Inception = None,
    lpips: Lpips = None,
    clip: Clip = None,
    classifier: Classifier = None,
    truth: Truth = None,
    speed: Speed = 3.0,
    prompts: Prompts = None,
    calls: Calls = None,
    out: Out = Path("runs/compare"),
    store: StoreFolder = None,
    executor: Kind = "processes",
    workers: Workers = None,
    threads: Threads = None,
    address: Address = None,
    any_code: AnyCode = False,
    device: Device = "cpu",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize in every way, measure all alike, and write compare.html, compare.md and results.parquet.

    Run the same command again to go on: finished cells are kept, failed ones are tried again.
    """
    from stepquant.evaluate.metrics.instruments import Weights
    from stepquant.job.compare import Evaluation, compare, grid
    from stepquant.job.results import DATA

    screen = Screen(quiet, brief=True)
    asked, count = read_sampling(prompts, calls, steps)
    chosen = {"images": images, "steps": count, "batch": batch, "sampler": sampler, "speed": speed}
    weights = Weights(inception, lpips, clip, classifier, truth)
    cells = grid(
        model,
        read_variants(read_names(methods), variant or []),
        read_names(schemes),
        range(seeds),
        Evaluation.of(**chosen, data=data or DATA.get(model), weights=weights),
        settings=read_settings(settings or []),
        **fields(asked, calibration_steps or count, sampler=sampler, device=device),
    )
    screen.warn_if_plain()
    kept = f"finished cells are kept in {store or out}; run the same command to go on"
    with keeping(kept), screen.reporter as bars:
        worked = choose_executor(executor, workers, threads, address, bars)
        compared = compare(cells, store or out, out=out, executor=worked, any_code=any_code, progress=bars)
    show(screen, compared, json)


def read_sampling(
    prompts: Path | None, calls: Path | None, steps: int | None
) -> tuple[tuple[Asked, ...], int]:
    """What is asked for, and in how many steps: those of the calls, where they say it."""
    asked = read_asked(prompts, calls)
    return asked, steps_of(asked, steps) or COUNT


def fields(asked: Sequence[Asked], steps: int, **others: Any) -> dict[str, Any]:
    """What all recipes have in common."""
    kind = "calls" if any(isinstance(one, Call) for one in asked) else "prompts"
    return {kind: asked or None, "steps": steps} | others


def results(
    sql: Annotated[
        str | None,
        typer.Option(
            "--sql",
            metavar="QUERY",
            help="Over the tables results, numbers and steps.",
            show_default="the headline columns",
        ),
    ] = None,
    store: Annotated[
        Path, typer.Option("--store", metavar="DIR", help="Folder of `stepquant compare`.")
    ] = Path("runs/compare"),
    json: Json = None,
) -> None:
    """Ask a run store in SQL: a row for each cell (results), each number (numbers), each denoising step (steps)."""
    from stepquant.job.compare.query import ask

    screen = Screen()
    columns, rows = ask(store, sql)
    screen.table("", columns, rows)
    screen.finish(json, {"columns": columns, "rows": [dict(zip(columns, row)) for row in rows]})


def choose_executor(
    name: str, workers: int | None, threads: int | None, address: str | None, progress: Progress
) -> Any:
    from stepquant.job.compare import Inline, Processes

    if address is not None and name != "ray":
        raise StepquantError("--address is that of a Ray cluster", fix="add --executor ray")
    if name == "inline":
        if workers or threads:
            raise StepquantError("--workers and --threads have no effect on --executor inline")
        return Inline(progress)
    if name == "processes":
        return Processes(workers or 1, progress, threads)
    if name != "ray":
        raise UnknownNameError("executor", name, EXECUTORS)
    from stepquant.job.compare.cluster import Cluster

    return Cluster(address, workers, threads or 1)


def show(screen: Screen, compared: Compared, json: Path | None) -> None:
    """The table of compare.md, narrower, and what its numbers were measured on."""
    from stepquant.job.compare.pages import circumstances, summary

    header, *rows = summary(compared.results)
    screen.table("", header, rows)
    screen.show()
    for line in circumstances(compared.results):
        screen.show(line)
    counts = f"{compared.made} made, {compared.found} found, {compared.failed} failed"
    screen.show(f"\n{compared.page}: {len(compared.results)} cells, {counts}")
    screen.finish(json, {"page": str(compared.page), "cells": list(compared.results)})


def read_names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def read_variants(methods: Sequence[str], words: Sequence[str]) -> list[Any]:
    """Methods as they are, then those with settings of their own."""
    from stepquant.job.compare import Variant

    out = [Variant(name) for name in methods]
    for word in words:
        name, colon, rest = word.partition(":")
        if not colon or not name.strip():
            raise StepquantError(f"cannot read --variant {word}", expected="NAME:KEY=VALUE,KEY=VALUE")
        out.append(Variant(name.strip(), read_settings(split_settings(rest))))
    if not out:
        raise StepquantError("nothing to compare", fix="name methods: --methods minmax,ptq4dm")
    return out


def split_settings(text: str) -> list[str]:
    """At commas that are not inside a list or table."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


COMMANDS: Mapping[str, Callable[..., None]] = {"compare": compare, "results": results}
