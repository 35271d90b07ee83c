"""Commands for files that other programs wrote: convert, and what inspect shows of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.explain import in_words
from stepquant.cli.options import Json, Policy
from stepquant.cli.screen import Screen, size_text
from stepquant.core.policy import StepPolicy


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="File of int8 or fp8 layers for ComfyUI, GGUF file, or folder of SDNQ.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write the network to.", show_default=False)
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the config.json of the float network in diffusers' format; a folder needs none.",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Round what cannot be multiplied in integers as it is, as to w8a8-dynamic.",
            show_default="nothing is rounded",
        ),
    ] = None,
    policy: Policy = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Denoising steps that --policy is about.", show_default="50"),
    ] = None,
    json: Json = None,
) -> None:
    """Make an ordinary folder of a file of packed integers; nothing is quantized again, unless a scheme asks for it."""
    from stepquant.job.foreign import convert as write

    screen = Screen()
    counted = {} if steps is None else {"steps": steps}
    made = write(file, out, config=config, scheme=scheme, policy=policy, **counted)
    rotated = ", ".join(str(group) for group in made.recipe["rotations"])
    floats = Counter(made.recipe["floats"].values())
    screen.show(f"wrote {made.folder}: {made.recipe['class']}, {size_text(made.bytes)}")
    fresh = len(made.recipe["rounded"])
    screen.show(
        f"{made.layers - fresh} layers in the integers of the file"
        + (f", rotated in groups of {rotated}" if rotated else "")
    )
    if fresh:
        screen.show(f"{fresh} layers rounded to {made.recipe['scheme']}")
    for reason, count in sorted(floats.items()):
        screen.show(f"{count} layers {'were' if scheme else 'are'} float: {reason}")
    screen.finish(
        json,
        {"folder": str(made.folder), "recipe": dict(made.recipe), "layers": made.layers, "bytes": made.bytes},
    )


def show_if_alone(path: Path, layers: bool, json: Path | None) -> bool:
    """What another program wrote, or a network without its pipeline; whether it is one of these."""
    from stepquant.hub.foreign.read import is_foreign
    from stepquant.job.foreign import is_network

    if is_foreign(path):
        show_file(path, layers, json)
        return True
    if is_network(path):
        show_network(path, layers, json)
        return True
    return False


def show_network(folder: Path, layers: bool, json: Path | None) -> None:
    """Where the integers of a folder came from, and how they are stored."""
    from stepquant.job.foreign import inspect_network

    screen, found = Screen(), inspect_network(folder)
    recipe, rows = found["recipe"], found["layers"]
    screen.show(f"{folder}: {found['class']}, digest {found['digest']}")
    if recipe.get("program"):
        formats = ", ".join(f"{count} layers of {name}" for name, count in recipe["formats"].items())
        told = origin(recipe["program"], recipe["dialect"])
        screen.show(f"converted from '{recipe['model']}': {formats or 'floats alone'}, {told}")
        if recipe.get("rounded"):
            screen.show(
                f"{len(recipe['rounded'])} layers rounded to {recipe['scheme']} when it was converted"
            )
        for reason, count in sorted(Counter(recipe["floats"].values()).items()):
            screen.show(f"{count} layers in float: {reason}")
    else:
        screen.show(f"{recipe.get('model', '')}: {recipe.get('method', '')} {recipe.get('scheme', '')}")
    grids = Counter((row["weight"], row["input"]) for row in rows)
    for (weight, inputs), count in sorted(grids.items()):
        screen.show(f"{count} layers with weights on {weight}, inputs {inputs}")
    show_policy(screen, found)
    if layers:
        screen.show()
        screen.table(
            "all layers",
            ("layer", "weight", "input", "rotation", "rank"),
            [
                (row["path"], row["weight"], row["input"], row.get("rotation", ""), row.get("rank", ""))
                for row in rows
            ],
        )
    screen.finish(json, found)


def show_file(file: Path, layers: bool, json: Path | None) -> None:
    """What a file says of itself, and which of its layers would run in integers here."""
    from stepquant.job.foreign import inspect_file

    screen, found = Screen(), inspect_file(file)
    rows: list[dict[str, Any]] = found["layers"]
    formats = ", ".join(f"{count} layers of {name}" for name, count in found["formats"].items())
    rotations = ", ".join(f"{count} in groups of {group}" for group, count in found["rotations"].items())
    screen.show(f"{file}: {formats or 'floats alone'}, {origin(found['program'], found['dialect'])}")
    screen.show(f"rotated: {rotations or 'none'}; {found['floats']} tensors in float")
    show_policy(screen, found)
    if found["others"]:
        screen.show(f"{found['others']} tensors of other parts are left where they are")
    kept, integers = (sum(row[key] for row in rows) for key in ("kept", "integer"))
    screen.show(f"{kept} of {len(rows)} layers would keep their integers")
    screen.show(f"{integers} of {len(rows)} layers would run in integers here")
    shown = [row for row in rows if layers or not row["integer" if integers else "kept"]]
    if shown:
        screen.show()
        screen.table(
            "all layers" if layers else "not in integers" if integers else "not kept",
            ("layer", "format", "shape", "scales by", "rotation", "runs as", "reason"),
            [
                (
                    row["path"],
                    row["format"],
                    " x ".join(map(str, row["shape"])),
                    row["scales"],
                    row["rotation"] or "",
                    "integer" if row["integer"] else "weight-only" if row["kept"] else "float",
                    row["reason"],
                )
                for row in shown
            ],
        )
    screen.finish(json, found)


def show_policy(screen: Screen, found: Mapping[str, Any]) -> None:
    if found["policy"] is not None:
        screen.show(f"activations in float at {in_words(StepPolicy.parse(found['policy']))}")


def origin(program: str, dialect: str) -> str:
    """Which files these are."""
    if program == "ComfyUI":
        return f"in the {dialect} dialect of ComfyUI"
    if program == "SDNQ":
        return f"by SDNQ {dialect}".rstrip()
    return f"in {program}{f' of architecture {dialect}' if dialect else ''}"


COMMANDS: Mapping[str, Callable[..., None]] = {"convert": convert}
