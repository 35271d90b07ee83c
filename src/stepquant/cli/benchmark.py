"""What a benchmark shows: single calls, whole generations, and where one call spends its time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant import hub
from stepquant.cli.options import writable
from stepquant.cli.screen import Screen
from stepquant.errors import StepquantError
from stepquant.job import load
from stepquant.models.denoiser import Denoiser

SHOWN_OPERATIONS = 20
Generation = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="STEPS",
        help="Also time whole generations in so many steps, first images and peak memory.",
        show_default="no",
    ),
]
Profile = Annotated[bool, typer.Option("--profile", help="Also show where one call spends its time.")]


def drawable(file: Path | None) -> Path | None:
    if file is not None and file.suffix.lower() != ".svg":
        raise StepquantError(f"cannot draw '{file.name}'", expected="a name that ends in .svg")
    return writable(file)


Chart = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw bars into an .svg file.", callback=drawable),
]


def beside_calls(
    screen: Screen, model: str, against: str | None, steps: int, profile: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What was asked for besides the time of a call, measured and shown; `options` as for the calls."""
    found: dict[str, Any] = {}
    common = {name: options[name] for name in ("count", "prompts")}
    if steps and hub.config_of(Denoiser.of(load(model)).model) is not None:
        from stepquant.job.benchmark import benchmark_generation

        timing = {name: options[name] for name in ("batches", "seconds")}
        found["generation"] = benchmark_generation(Path(model), against, steps=steps, **timing, **common)
        show_generation(screen, found["generation"])
    if profile:
        from stepquant.job.benchmark import profile_call

        found["profile"] = profile_call(model, options["batches"][0], **common)
        show_profile(screen, found["profile"])
    return found


def draw(screen: Screen, speed: Mapping[str, Any], chart: Path | None) -> None:
    if chart is None:
        return
    from stepquant.report.bars import write_bars

    write_bars(speed, chart)
    screen.say(f"drawn: {chart}")


def show_speed(screen: Screen, speed: Mapping[str, Any]) -> None:
    rows = [
        (
            row["batch"],
            row["name"],
            spread(row, "milliseconds"),
            spread(row, "ratio"),
            row["layout"] or row["unavailable"],
        )
        for row in speed["rows"]
    ]
    title = f"one call of the denoiser, {speed['threads']} threads, {speed['rounds']} rounds; median and quartiles"
    screen.table(title, ("batch", "contender", "ms", f"times {speed['reference']}", ""), rows)


def spread(row: Mapping[str, Any], name: str) -> str:
    """`median (quartile to quartile)`."""
    if row[name] is None:
        return "not measured"
    low, high = ("ratio_low", "ratio_high") if name == "ratio" else ("low", "high")
    return f"{row[name]:.3g} ({row[low]:.3g} to {row[high]:.3g})"


def show_generation(screen: Screen, found: Mapping[str, Any]) -> None:

    rows = [
        (row["batch"], row["name"], spread(row, "milliseconds"), spread(row, "ratio"))
        for row in found["rows"]
    ]
    title = f"a batch of images in {found['steps']} steps, {found['threads']} threads; median and quartiles"
    screen.table(title, ("batch", "contender", "ms", f"times {found['reference']}"), rows)
    processes = [
        (
            row["batch"],
            row["name"],
            f"{row['load_seconds']:.2f}",
            f"{row['first_image_seconds']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{(row['peak_bytes'] - row['start_bytes']) / 2**20:.0f}",
        )
        for row in found["processes"]
    ]
    header = ("batch", "contender", "s to load", "s to first images", "peak MiB", "of it beyond imports")
    screen.table("each in a process of its own", header, processes)


def show_profile(screen: Screen, found: Mapping[str, Any]) -> None:
    rows = [
        (
            row["name"],
            f"{row['calls']:.0f}",
            f"{row['milliseconds']:.3f}",
            f"{row['share']:.1%}",
            number(row["gigabytes_per_second"]),
            number(row["tera_operations_per_second"]),
        )
        for row in found["rows"][:SHOWN_OPERATIONS]
    ]
    best = found["ceilings"]
    rows.append(
        (
            "the best of this machine",
            "",
            "",
            "",
            number(best.get("gigabytes_per_second")),
            number(best.get("tera_operations_per_second")),
        )
    )
    title = f"one call, batch {found['batch']}, {found['threads']} threads: {found['milliseconds']:.2f} ms"
    screen.table(title, ("operation", "calls", "ms", "share", "GB/s", "TOPS"), rows)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
