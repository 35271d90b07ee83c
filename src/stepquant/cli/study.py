"""Commands that study a model and plan its bits: sensitivity, layers, allocate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.interrupt import keeping
from stepquant.cli.options import (
    DEFAULT_MODEL,
    ArtifactFolder,
    Calls,
    Device,
    Json,
    Model,
    PlanFile,
    Prompts,
    Quiet,
    Sampler,
    Scheme,
    Seed,
    read_asked,
    writable,
)
from stepquant.cli.screen import Screen, command_text, size_text
from stepquant.cli.words import read_counts
from stepquant.errors import StepquantError
from stepquant.job import Recipe, plan_json

SHOWN = 12  # of the sites, the most sensitive

Out = Annotated[
    Path, typer.Option(metavar="FILE", help="JSON file to write.", show_default=False, callback=writable)
]
Samples = Annotated[int, typer.Option(min=1, metavar="N", help="Recorded states to predict noise on.")]
Steps = Annotated[int, typer.Option(min=1, metavar="N", help="Denoising steps of their trajectories.")]
Images = Annotated[int, typer.Option(min=1, metavar="N", help="Images, for metrics that look at them.")]
ImageSteps = Annotated[int, typer.Option(min=1, metavar="N", help="Denoising steps of these images.")]
Metrics = Annotated[
    str, typer.Option(metavar="NAME,...", help="noise, psnr, ssim (content), features (quality).")
]

Ports = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Of the sites, as in plans: weight, input, query, ... A budget of bytes needs weight alone.",
        show_default="all",
    ),
]


def sensitivity(
    out: Out,
    model: Model = DEFAULT_MODEL,
    bits: Annotated[str, typer.Option(metavar="N,N,...", help="Bits to try at each site.")] = "4,6,8",
    metric: Metrics = "noise",
    ports: Ports = None,
    scheme: Scheme = None,
    plan: PlanFile = None,
    samples: Samples = 32,
    steps: Steps = 20,
    images: Images = 8,
    image_steps: ImageSteps = 8,
    sampler: Sampler = None,
    prompts: Prompts = None,
    calls: Calls = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure what each site loses when it alone has few bits; an interrupted run goes on where it was."""
    from stepquant.evaluate.study.sensitivity import Study
    from stepquant.job.study import study_model

    screen = Screen(quiet)
    asked = read_asked(prompts, calls)
    recipe = Recipe.of(
        model=model,
        scheme=scheme,
        plan=plan_json(plan),
        sampler=sampler,
        seed=seed,
        device=device,
        **{"prompts" if calls is None else "calls": asked or None},
    )
    recipe.check()
    counts = {"samples": samples, "steps": steps, "images": images, "image_steps": image_steps}
    widths, chosen = read_counts(bits, "--bits"), read_names(ports) if ports else ()
    study = Study(widths, read_names(metric), sampler=sampler, seed=seed, ports=chosen, **counts)
    with keeping("finished sites are kept; run the same command again to go on"), screen.reporter as progress:
        found = study_model(recipe, study, out, progress)
    show_worst(screen, found)
    screen.show(f"wrote {out}: {len(found['rows'])} rows, {len(found['sites'])} sites")
    screen.say(f"next: {command_text(['allocate', str(out), '--budget-bytes', 'N', '--out', 'plan.json'])}")
    screen.finish(json, found)


def read_names(text: str) -> tuple[str, ...]:
    """`noise,psnr` as names."""
    return tuple(name.strip() for name in text.split(","))


def show_worst(screen: Screen, found: Mapping[str, Any]) -> None:
    """The sites that lose most at the fewest bits, by each metric."""
    fewest = min(found["study"]["bits"])
    for metric in found["study"]["metrics"]:
        higher = metric in ("psnr", "ssim")
        rows = [row for row in found["rows"] if row["bits"] == fewest and row["metric"] == metric]
        rows = sorted(rows, key=lambda row: row["value"], reverse=not higher)[:SHOWN]
        screen.table(
            f"most sensitive at {fewest} bits",
            ("site", "role", metric),
            [(f"{row['path']}:{row['port']}", row["role"], row["value"]) for row in rows],
        )
        screen.show()


def layers(
    folder: ArtifactFolder,
    out: Out,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The float model.", show_default="as the artifact says"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Batch size.")] = 8,
    device: Device = "cpu",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Time every layer of an artifact beside that of its float model, for `allocate --budget-ms`."""
    from stepquant.job.study import time_layers

    screen = Screen(quiet)
    screen.warn_if_plain()
    with screen.reporter as progress:
        found = time_layers(folder, out, against, batch=batch, device=device, progress=progress)
    totals = {
        kind: sum(row["milliseconds"] for row in found["rows"] if row["integer"] is kind)
        for kind in (False, True)
    }
    screen.show(
        f"wrote {out}: layers take {totals[False]:.2f} ms in float, {totals[True]:.2f} ms in integers"
    )
    screen.finish(json, found)


def allocate(
    study: Annotated[
        Path, typer.Argument(metavar="FILE", help="What `sensitivity` wrote.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Plan to write.", show_default=False, callback=writable)
    ],
    budget_bytes: Annotated[
        float | None, typer.Option(metavar="N", help="Bytes of all packed weights and their scales.")
    ] = None,
    budget_bops: Annotated[
        float | None, typer.Option(metavar="N", help="Bit operations of one call, one image.")
    ] = None,
    budget_ms: Annotated[
        float | None, typer.Option(metavar="N", help="Milliseconds of all timed layers.")
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="One that was studied, or decoupled: ssim and features.")
    ] = "noise",
    times: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `layers` wrote.", show_default=False)
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Choose the bits of every site that lose least within a budget, and write a plan for `quantize --plan`."""
    from stepquant.job.study import allocate_file

    screen = Screen(quiet)
    given = {"bytes": budget_bytes, "bops": budget_bops, "ms": budget_ms}
    asked = [(kind, value) for kind, value in given.items() if value is not None]
    if len(asked) != 1:
        raise StepquantError(
            "give one budget",
            got=f"{len(asked)}",
            expected="--budget-bytes N, --budget-bops N or --budget-ms N",
        )
    kind, budget = asked[0]
    found = allocate_file(study, out, kind, budget, metric, times)  # type: ignore[arg-type]
    screen.table(
        f"cost in {kind} and expected loss",
        ("bits", "cost", "loss"),
        [("allocated", amount(found.cost, kind), found.loss)]
        + [
            (f"{width} everywhere", amount(cost, kind), loss) for width, (cost, loss) in found.uniform.items()
        ],
    )
    screen.show(
        "sites by bits: " + ", ".join(f"{count} at {width}" for width, count in found.counts().items())
    )
    screen.show(f"wrote {out}")
    screen.say(f"next: {command_text(['quantize', '--plan', str(out), '--out', 'DIR'])}")
    screen.finish(
        json, {"plan": found.plan.to_json(), "bits": found.bits, "cost": found.cost, "loss": found.loss}
    )


def amount(cost: float, kind: str) -> str:
    return (
        size_text(cost) if kind == "bytes" else f"{cost / 1e9:.3f} G" if kind == "bops" else f"{cost:.3f} ms"
    )


COMMANDS: Mapping[str, Callable[..., None]] = {
    "sensitivity": sensitivity,
    "layers": layers,
    "allocate": allocate,
}
