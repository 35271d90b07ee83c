"""Commands that show an artifact: inspect, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.explain import in_words
from stepquant.cli.foreign import show_if_alone
from stepquant.cli.options import ArtifactFolder, ArtifactOrFile, Fastest, Json
from stepquant.cli.screen import Screen, size_text
from stepquant.core.policy import StepPolicy
from stepquant.runtime import ops

Rows = Sequence[Mapping[str, Any]]


def inspect(
    folder: ArtifactOrFile,
    layers: Annotated[
        bool, typer.Option("--layers", help="Every layer, not only those that run in float.")
    ] = False,
    fastest: Fastest = False,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Batch size for --fastest.")] = 1,
    json: Json = None,
) -> None:
    """Show how an artifact was made, and which share of its work ran in integers in one call on this machine.

    Of a file or folder that another program wrote: which integers it holds, and what of it would run here. Of a network
    that lies alone in a folder, as `convert` writes it: where it came from.
    """
    if show_if_alone(folder, layers, json):
        return
    from stepquant.job.results import inspect_artifact

    screen = Screen()
    with screen.reporter as progress:
        found = inspect_artifact(folder, batch if fastest else None, progress)
    quantized, rows = found["quantized"], found["coverage"]
    recipe = quantized["recipe"]
    screen.show(
        f"{folder}: {recipe['model']}, {quantized['method']} {quantized['scheme']}, digest {quantized['digest']}"
    )
    how = "rounded while it was loaded, without calibration"
    ranges = any(row["input"] != "float" and not row["input"].endswith("/token") for row in rows)
    if "sampler" in recipe and not ranges:
        how = f"made with seed {recipe['seed']}, without ranges of activations"
    elif "sampler" in recipe:
        how = f"calibrated with seed {recipe['seed']} over {recipe['steps']} steps of {recipe['sampler']}"
    screen.show(f"{how}; weights {size_text(found['size']['bytes'])}; C++ kernels: {ops.capability()}")
    if found["steps"]:
        screen.show(steps_text(found["steps"], rows))
    if "policy" in found:
        screen.show(f"activations in float at {in_words(StepPolicy.parse(found['policy']['steps']))}")
    shares = integer_shares(rows)
    screen.show(shares_text(shares))
    screen.show()
    show_layers(screen, rows, layers)
    show_parts(screen, found.get("parts", ()), layers)
    screen.finish(json, found | {"shares": shares})


def show_parts(screen: Screen, parts: Rows, layers: bool) -> None:
    """The quantized networks beside the denoiser, each as it ran when the pipeline made one image."""
    for part in parts:
        size, rows = part["size"], part["coverage"]
        screen.show()
        screen.show(
            f"{part['name']}: {part['class']}, digest {part['digest']}; weights {size_text(size['bytes'])}, "
            f"{size['ratio']:.3f} of fp32; {shares_text(integer_shares(rows))}"
        )
        show_layers(screen, rows, layers)


def show_layers(screen: Screen, rows: Rows, layers: bool) -> None:
    """What ran in float, or everything."""
    total = sum(row["macs"] for row in rows) or 1
    listed = [row for row in rows if layers or not row["integer"]]
    screen.table(
        "all layers" if layers else "not in integers" if listed else "",
        ("layer", "role", "share", "weight", "input", "runs as", "reason"),
        [
            (
                row["path"],
                row["role"],
                f"{row['macs'] / total:.3%}",
                row["weight"],
                f"{row['input']}, rotated by {row['rotation']}" if row.get("rotation") else row["input"],
                f"integer {row['kernel']}" if row["integer"] else "float",
                row["reason"],
            )
            for row in listed
        ],
    )


def steps_text(steps: Mapping[str, Any], rows: Rows) -> str:
    """What changes from step to step."""
    parts = [f"knows {steps['times']} values of t"]
    stepped = sum("/step" in row["input"] for row in rows)
    if steps["groups"] > 1 and stepped:
        parts.append(f"{steps['groups']} ranges by step for the inputs of {stepped} of {len(rows)} layers")
    parts += [f"a table of {steps['table']} columns for the time embedding"] if steps["table"] else []
    noise = {"absorb": ", the sampler's noise absorbs the rest", "sample": ", the rest is taken off as noise"}
    if steps["channels"]:
        parts.append(f"predictions corrected at every step{noise.get(steps['noise'], '')}")
    return "; ".join(parts)


def integer_shares(rows: Rows) -> dict[str, float]:
    """Shares of multiply-accumulates in integers: of all, and of those whose weight and input the plan quantizes."""
    planned = [row for row in rows if "float" not in (row["weight"], row["input"])]
    return {"of_all": share(rows), "of_planned": share(planned)}


def shares_text(shares: Mapping[str, float]) -> str:
    return (
        f"{shares['of_all']:.2%} of the multiply-accumulates ran in integers, "
        f"{shares['of_planned']:.2%} of those that the plan quantizes"
    )


def share(rows: Rows) -> float:
    total = sum(row["macs"] for row in rows)
    return sum(row["macs"] for row in rows if row["integer"]) / total if total else 0.0


def report(
    folder: ArtifactFolder,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the page.", show_default="beside the weights"),
    ] = None,
    json: Json = None,
) -> None:
    """Write report.html, one self-contained page, from what `evaluate` and `benchmark` measured."""
    from stepquant.job.results import report_artifact

    screen = Screen()
    page, results = report_artifact(folder, out)
    screen.show(f"wrote {page}")
    screen.finish(json, {"page": str(page)} | results)


COMMANDS: Mapping[str, Callable[..., None]] = {"inspect": inspect, "report": report}
