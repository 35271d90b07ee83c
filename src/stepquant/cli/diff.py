"""The command that lays two artifacts side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.options import Json, drawable
from stepquant.cli.screen import Screen, size_text

First = Annotated[
    Path, typer.Argument(metavar="A", help="Artifact, or its folder in a run store.", show_default=False)
]
Second = Annotated[Path, typer.Argument(metavar="B", help="The other one.", show_default=False)]


def diff(
    first: First,
    second: Second,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="FILE",
            help="Write a grid: float, A and B row by row.",
            show_default=False,
            callback=drawable,
        ),
    ] = None,
    layers: Annotated[int, typer.Option(min=0, metavar="N", help="Layers to list.")] = 20,
    json: Json = None,
) -> None:
    """Show what differs between two artifacts: recipe, sizes, grids and integers layer by layer, and what was measured."""
    from stepquant.job.diff import diff as compare_artifacts
    from stepquant.job.diff import draw, to_text

    screen = Screen()
    found = compare_artifacts(first, second)
    for name in ("a", "b"):
        side = found[name]
        screen.show(f"{name}: {side['name']}, {size_text(side['bytes'])}, digest {side['digest']}")
    screen.show()
    recipe = [(row["key"], to_text(row["a"]), to_text(row["b"])) for row in found["recipe"]]
    if recipe:
        screen.table("recipe", ("key", "a", "b"), recipe)
        screen.show()
    show_layers(screen, found, layers)
    if found["quality"]:
        screen.show()
        shown = ("name", "against", "a", "b", "floor")
        rows = [(*(row[key] for key in shown), pair(row["n"])) for row in found["quality"]]
        screen.table("measured", ("metric", "against", "a", "b", "floor", "n"), rows)
    if found["images"]:
        screen.show(
            f"\nPSNR between the {len(found['images']['seeds'])} images of both: {found['images']['psnr']:.1f} dB"
        )
    if images is not None:
        draw(first, second, images)
        screen.show(f"wrote {images}")
    screen.finish(json, found)


def show_layers(screen: Screen, found: Mapping[str, Any], most: int) -> None:
    """Those that differ, the most changed first."""
    rows = sorted(found["layers"], key=lambda row: -1 if row["changed"] is None else -row["changed"])
    screen.show(f"{len(rows)} layers differ, {found['unchanged']} are the same in every bit")
    listed = [
        (
            row["path"],
            pair(row["weight"]),
            pair(row["input"]),
            "" if row["changed"] is None else f"{row['changed']:.2%}",
            row["largest"],
            percent(row["weight_scale"]),
            percent(row["input_scale"]),
        )
        for row in rows[:most]
    ]
    if listed:
        head = ("layer", "weight", "input", "integers changed", "by at most", "weight scale", "input scale")
        screen.table("", head, listed)
    if len(rows) > most:
        screen.show(f"and {len(rows) - most} more: --layers {len(rows)}, or --json FILE")
    if found["products"]:
        products = [(r["path"], r["port"], pair(r["grid"]), percent(r["scale"])) for r in found["products"]]
        screen.table("\nattention products that differ", ("attention", "operand", "grid", "scale"), products)


def pair(values: Any) -> str:
    """`a`, or `a -> b` where they differ."""
    left, right = values
    return str(left) if left == right else f"{left} -> {right}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


COMMANDS: Mapping[str, Callable[..., None]] = {"diff": diff}
