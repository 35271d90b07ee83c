"""Commands that make things: quantize, card, generate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from stepquant import hub, methods
from stepquant.calib.cache import cache_folder
from stepquant.calib.record import MEMORY
from stepquant.cli.explain import explain_all
from stepquant.cli.interrupt import keeping
from stepquant.cli.options import (
    DEFAULT_MODEL,
    AnyModel,
    ArtifactFolder,
    Auto,
    BudgetBytes,
    CalibrationSteps,
    Calls,
    Components,
    Device,
    Explain,
    Fastest,
    Json,
    LowMemory,
    Memory,
    Method,
    Model,
    NoCard,
    OutFolder,
    PlanFile,
    Policy,
    Prompts,
    Quiet,
    Resume,
    Sampler,
    Samples,
    Scheme,
    Seed,
    Settings,
    Steps,
    playable,
    read_asked,
    read_settings,
)
from stepquant.cli.screen import Screen, command_text, size_text
from stepquant.errors import StepquantError
from stepquant.job import Outcome, Recipe, load, plan_json, quantize_to
from stepquant.job.files import CARD
from stepquant.job.pipelines import sampling_of
from stepquant.models.call import Asked, Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.pipelines.results import SOUNDS, sampling_rate
from stepquant.quant.auto import AUTO


def quantize(
    model: Model = DEFAULT_MODEL,
    method: Method = "ptq4dm",
    scheme: Scheme = None,
    out: OutFolder = None,
    steps: CalibrationSteps = None,
    sampler: Sampler = None,
    samples: Samples = None,
    settings: Settings = None,
    plan: PlanFile = None,
    prompts: Prompts = None,
    calls: Calls = None,
    auto: Auto = False,
    budget_bytes: BudgetBytes = None,
    components: Components = None,
    policy: Policy = None,
    explain: Explain = False,
    resume: Resume = False,
    no_card: NoCard = False,
    seed: Seed = 0,
    device: Device = "cpu",
    memory: Memory = MEMORY / 2**30,
    low_memory: LowMemory = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a model, calibrated on its own denoising trajectories, and write an ordinary diffusers folder."""
    screen = Screen(quiet)
    chosen = read_settings(settings or [])
    records = methods.records(method, samples)
    if twice := records.keys() & chosen.keys():
        raise StepquantError(f"--samples and --set {twice.pop()}= say the same thing", fix="give one of them")
    recipe = Recipe.of(
        model=model,
        method=method,
        scheme=scheme_of(scheme, auto, budget_bytes),
        plan=plan_json(plan),
        settings=chosen | records,
        steps=steps,
        sampler=sampler,
        seed=seed,
        device=device,
        components=read_names(components),
        policy=policy,
        **{"prompts" if calls is None else "calls": read_asked(prompts, calls) or None},
    )
    recipe.check()
    if out is None and not explain:
        raise StepquantError("where to write the artifact?", fix="add --out DIR, or --explain for the plan")
    result: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    if explain:
        result |= explain_all(screen, recipe)
    if out is not None:
        result |= make_artifact(screen, recipe, out, resume, int(memory * 2**30), low_memory)
        result["card"] = None if no_card or low_memory else add_card(screen, out, device, recipe.calls)
        if not result["found"]:
            words = ["generate", str(out)] + (["--sampler", recipe.sampler] if recipe.sampler else [])
            screen.say(f"next: {command_text([*words, '--out', 'grid.png'])}")
    screen.finish(json, result)


def scheme_of(scheme: str | None, auto: bool, budget_bytes: int | None) -> str | None:
    """The name of the scheme that the options ask for together."""
    asked = {"--scheme": scheme is not None, "--auto": auto, "--budget-bytes": budget_bytes is not None}
    given = [name for name, there in asked.items() if there]
    if len(given) > 1:
        raise StepquantError(f"{' and '.join(given)} say the same thing", fix="give one of them")
    if budget_bytes is not None:
        return f"auto-{budget_bytes}bytes"
    return AUTO if auto else scheme


def read_names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def make_artifact(
    screen: Screen, recipe: Recipe, out: Path, resume: bool, memory: int, low_memory: bool
) -> dict[str, Any]:
    """Quantize with progress, and say what came out."""
    screen.warn_if_plain()
    start = time.monotonic()
    with keeping(how_to_resume(out)), screen.reporter:
        outcome = quantize_to(
            recipe, out, resume=resume, memory=memory, low_memory=low_memory, progress=screen.reporter
        )
    seconds = time.monotonic() - start
    screen.show(outcome_text(outcome, seconds))
    return {
        "out": str(out),
        "found": outcome.found,
        "seconds": None if outcome.found else seconds,
        "weights_bytes": outcome.weights_bytes,
        "float_bytes": outcome.float_bytes,
        "share": outcome.share,
        "parts": {name: {"bytes": mine, "float_bytes": full} for name, (mine, full) in outcome.parts.items()},
        "artifact_recipe": dict(outcome.recipe),
    }


def outcome_text(outcome: Outcome, seconds: float) -> str:
    recipe = outcome.recipe
    size = (
        f"{size_text(outcome.weights_bytes)}, {outcome.share:.3f} of fp32 ({size_text(outcome.float_bytes)})"
    )
    for name, (mine, full) in outcome.parts.items():
        size += f"; {name} {size_text(mine)}, {mine / full:.3f} of {size_text(full)}"
    if outcome.found:
        return f"{outcome.out} is there already, finished, from the same recipe: {size}"
    return f"wrote {outcome.out}: {recipe['method']} {recipe['scheme']}, {size}, in {seconds:.0f} s"


def add_card(screen: Screen, folder: Path, device: str, calls: Sequence[Call] = ()) -> Path:
    """The model card of a finished artifact, which is kept as it is whatever becomes of the card."""
    if (folder / CARD).exists():
        return folder / CARD
    later = f"{folder} is finished and can be used; make its model card with: {command_text(['card', str(folder)])}"
    with keeping(later), screen.reporter as progress:
        try:
            from stepquant.job.card import write_card  # imports what measures, which takes a second

            return write_card(folder, calls, device=device, progress=progress)
        except Exception as error:
            error.add_note(later)
            raise


def card(
    folder: ArtifactFolder,
    calls: Calls = None,
    device: Device = "cpu",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write the model card of an artifact: README.md with images (samples.png) and what was measured so far."""
    from stepquant.job.card import write_card

    screen = Screen(quiet)
    screen.warn_if_plain()
    with screen.reporter as progress:
        page = write_card(folder, read_asked(None, calls), device=device, progress=progress)
    screen.show(f"wrote {page}")
    screen.finish(json, {"card": str(page)})


def how_to_resume(out: Path) -> str:
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return (
        f"{out} was not touched; recorded trajectories are kept in {cache_folder()}.\n"
        f"Go on with: {command_text([*words, '--resume'])}"
    )


def generate(
    model: AnyModel,
    images: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many, with seeds SEED, SEED+1, ...")
    ] = 64,
    steps: Steps = None,
    sampler: Sampler = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of the grid; .gif for videos, .wav for sounds.",
            callback=playable,
            show_default="grid.png, .gif or .wav",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 32,
    prompts: Prompts = None,
    calls: Calls = None,
    fastest: Fastest = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Generate images with a float model or an artifact, one seed each, as one grid."""
    from stepquant.models.generate import sample
    from stepquant.report.media import file_for, name_of, write_media

    screen = Screen(quiet)
    pipeline = load(model, device)
    if hub.config_of(Denoiser.of(pipeline).model) is not None:
        screen.warn_if_plain()
    chosen = sampling_of(pipeline, steps, sampler, read_asked(prompts, calls))
    if fastest:
        go_fastest(screen, pipeline, min(batch, images), chosen.prompts)
    seeds = range(seed, seed + images)
    start = time.monotonic()
    batches: list[Tensor] = []
    with screen.reporter as progress:
        for made in sample(pipeline, seeds, chosen, batch=batch, progress=progress):
            file = file_for(made, out)  # the first batch shows whether the name suits
            batches.append(made)
    seconds = time.monotonic() - start
    write_media(batches, file, sampling_rate(pipeline) if made.ndim == SOUNDS else 0)
    what = f"{images} {name_of(made)}, seeds {seed} to {seed + images - 1}"
    screen.show(f"wrote {file}: {what}, {seconds:.1f} s")
    result = {"out": str(file), "images": images, "seed": seed, "steps": chosen.steps, "seconds": seconds}
    screen.finish(json, result)


def go_fastest(screen: Screen, pipeline: Any, batch: int, prompts: Sequence[Asked]) -> None:
    from stepquant.job.fastest import fastest

    with screen.reporter as progress:
        found = fastest(pipeline, batch, prompts=prompts, progress=progress)
    kept = sum(layer.stays_float for layer in found)
    screen.say(f"{kept} of {len(found)} layers are faster in bfloat16 here, at batch {batch}, and stay in it")


COMMANDS: Mapping[str, Callable[..., None]] = {"quantize": quantize, "card": card, "generate": generate}
