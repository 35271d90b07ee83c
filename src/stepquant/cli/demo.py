"""The demo: the main job on the embedded model, from float to a page of results, in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.interrupt import keeping
from stepquant.cli.make import add_card, outcome_text
from stepquant.cli.measure import show_table
from stepquant.cli.options import DEFAULT_MODEL, Device, Json, Quiet, Seed
from stepquant.cli.screen import Screen
from stepquant.job import Recipe, quantize_to

# Sized for five minutes on two quick cores; the defaults of the other commands are more thorough.
SAMPLES, CALIBRATION_STEPS, IMAGES, STEPS, BATCHES, SECONDS = 256, 50, 192, 50, (1, 8), 5.0


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the artifact and the report.")] = Path(
        "runs/demo"
    ),
    seed: Seed = 0,
    device: Device = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile, which takes minutes to build.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize the embedded model with PTQ4DM at w8a8, and measure quality, size and speed: a few minutes."""
    screen = Screen(quiet)
    screen.warn_if_plain()
    screen.say(
        f"demo: {DEFAULT_MODEL}, ptq4dm, w8a8; {SAMPLES} calibration records of {CALIBRATION_STEPS} steps, "
        f"{IMAGES} image pairs of {STEPS} steps, timing at batch {' and '.join(map(str, BATCHES))}"
    )
    start = time.monotonic()
    with keeping(f"what is finished is kept in {out}; run it again to go on"), screen.reporter:
        results, page = run_demo(screen, out, seed, device, compiled)
    show_table(screen, results)
    screen.show(
        f"\nreport: {page}   artifact: {out / 'characters-w8a8'}   in {time.monotonic() - start:.0f} s"
    )
    screen.finish(json, results)


def run_demo(
    screen: Screen, out: Path, seed: int, device: str, compiled: bool
) -> tuple[dict[str, Any], Path]:
    from stepquant.evaluate.speed.calls import baselines_here
    from stepquant.job.results import benchmark_artifact, evaluate_artifact, report_artifact

    folder, progress = out / "characters-w8a8", screen.reporter
    recipe = Recipe.of(
        model=DEFAULT_MODEL, settings={"samples": SAMPLES}, steps=CALIBRATION_STEPS, seed=seed, device=device
    )
    start = time.monotonic()
    outcome = quantize_to(recipe, folder, resume=True, progress=progress)
    screen.say(outcome_text(outcome, time.monotonic() - start))
    add_card(screen, folder, device)
    evaluate_artifact(folder, steps=STEPS, device=device, progress=progress, images=IMAGES, seed=seed)
    timing: dict[str, Any] = {"batches": BATCHES, "seconds": SECONDS, "baselines": baselines_here(compiled)}
    results = benchmark_artifact(folder, device=device, progress=progress, **timing)
    page, _ = report_artifact(folder, out)
    return results, page


COMMANDS: Mapping[str, Callable[..., None]] = {"demo": demo}
