"""The command that writes an artifact as a file of another program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import ArtifactFolder, Json, Quiet
from stepquant.cli.screen import Screen, size_text


def export(
    folder: ArtifactFolder,
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="comfyui, gguf, sdnq, onnx or openvino.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="File to write; a folder for sdnq.", show_default=False)
    ],
    component: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which of several quantized networks, by its folder.",
            show_default="(the denoiser)",
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="original: as in the network's own repository, where that is known; or diffusers.",
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="List every layer, not only those whose integers are left behind."),
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write an artifact as a file that another program reads, in its own integers: nothing is rounded again."""
    from stepquant.job.export import check_place, exporting, write

    screen = Screen(quiet)
    check_place(out, to)
    made = exporting(folder, to, component, names)
    seen = made.outlook
    for words in (*seen.notes, *(f"left behind: {words}" for words in seen.left)):
        screen.say(words)
    screen.say(f"{seen.kept} of {len(seen.fates)} quantized layers keep their integers in a file for {to}")
    with screen.reporter as progress:
        done = write(made, out, progress)
    screen.show(f"wrote {done.file}: {made.network.kind}, {size_text(done.bytes)}")
    kinds = Counter(fate.becomes for fate in seen.fates)
    screen.show(", ".join(f"{count} layers as {kind}" for kind, count in kinds.most_common()))
    for words in seen.left:
        screen.show(f"left behind: {words}")
    shown = [fate for fate in seen.fates if layers or not fate.kept]
    if shown:
        screen.show()
        screen.table(
            "all layers" if layers else "not in their integers",
            ("layer", "in the file", "reason"),
            [(fate.path, fate.becomes, fate.reason) for fate in shown],
        )
    screen.finish(json, {"file": str(done.file), "format": to, "bytes": done.bytes} | seen.to_json())


COMMANDS: Mapping[str, Callable[..., None]] = {"export": export}
