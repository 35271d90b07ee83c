"""Make methods.md: every published method on the embedded model, with ablations, beside the float model and its noise.

    python benchmarks/methods.py                                   everything (hours)
    python benchmarks/methods.py --parts methods --schemes w4a8    a part of it
    python benchmarks/methods.py --images 64 --steps 10 --set iterations=10 --methods minmax,brecq --out try.md
    python benchmarks/methods.py --model stepquant:characters-text ...             another model, in files of its own

Interrupt it whenever you like, and run it again to go on: finished cells are kept in --store, failed ones tried again, and the
file has what there is. `--table` writes the file from the store at any time, while it runs, too. What the tables show of a cell
is kept in --figures as well, and such a cell is not measured again but with --again.
Words between `<!-- words NAME -->` and `<!-- end -->` are yours: they stay when the file is made again.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import figures
from learnt import check_learnt
from method_tables import step_table, table
from rich.console import Console

from stepquant import methods as registry
from stepquant.calib.cache import atomically
from stepquant.cli.options import read_settings
from stepquant.cli.reporter import Reporter, clock
from stepquant.errors import StepquantError
from stepquant.evaluate.describe import describe_float
from stepquant.job.compare import Cell, Evaluation, Processes, Variant, compare, grid, known
from stepquant.job.compare.grid import check_used, shared
from stepquant.job.pipelines import load
from stepquant.job.results import DATA
from stepquant.models.denoiser import Denoiser

MODEL = "stepquant:characters"
SCHEMES, MAIN = ("w8a8", "w6a6", "w4a8", "w4a4"), "w4a8"
FOUR_BITS = ("w4a8", "w4a4")
# What the tables are made of: title and rows. The rows of an ablation are all at MAIN.
EDA_DM = [
    Variant("eda_dm", {"times": times, "layers": layers})
    for times in ("uniform", "tdac")
    for layers in (0, 0.8)
]
GAC = [
    Variant("gac", {"visits": 0}, "gac, uniform weights"),
    Variant("gac", {"alignment": 0}, "gac, learnt weights without alignment"),
    Variant("gac", {}, "gac, learnt weights with alignment (default)"),
    *(Variant("gac", {"validation": share}) for share in (0.02, 0.1)),
    *(Variant("gac", {"temperature": temperature}) for temperature in (0.5, 2)),
]
BIAS = [
    Variant(name, settings)
    for name in ("minmax", "ptq4dm", "mixdq", "gptq")
    for settings in ({}, {"bias": True})
]
PARTS = ("methods", "eda_dm", "gac", "bias")
Key = Callable[[Cell], str]


def main() -> int:
    options = read_options()
    stopped = False
    try:
        tables = plan_tables(options)
        pipeline = load(options.model)
        kept = figures.read(options.figures, describe_float(pipeline)["digest"])
        key = partial(figures.key, Denoiser.of(pipeline))
        try:
            if not options.table:
                check_learnt(Denoiser.of(pipeline).model, options.model)
                run_tables(options, tables, {} if options.again else kept, key)
        except KeyboardInterrupt:
            stopped = True
        found = read_results(options, tables, key)
        kept |= {name: figures.compact(row) for name, row in found.items() if "error" not in row}
        figures.write(options.figures, kept)
        text = fill(options, rows_of(tables, found | kept, key))
    except StepquantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    atomically(options.out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"wrote {options.out}; the page about all cells: {options.store / 'compare.html'}")
    if stopped:
        print("finished cells are kept; run the same command to go on", file=sys.stderr)
    return 130 if stopped else 0


def read_options(typed: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=MODEL)
    add("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    add("--methods", default="", help="those of the main table; all by default")
    add("--schemes", default=",".join(SCHEMES))
    add("--seeds", type=int, default=3, help="at 4 bits; one elsewhere")
    add("--images", type=int, default=2048)
    add("--steps", type=int, default=50, help="denoising steps of the images")
    add("--calibration-steps", type=int, help="as --steps by default, which step corrections need")
    add("--batch", type=int, default=64)
    add("--speed", type=float, default=0.0, help="seconds of timing a cell; 0: none")
    add("--set", action="append", default=[], help="KEY=VALUE for every method that has the field")
    add("--workers", type=int, default=1)
    add("--table", action="store_true", help="write the file from what is in the store, and make nothing")
    add("--any-code", action="store_true", help="keep finished cells that other code made")
    add("--again", action="store_true", help="measure cells again whose figures are kept")
    add("--figures", type=Path, help="methods.jsonl beside this file, or with the model's name in it")
    add("--store", type=Path, default=Path("runs/methods"))
    add("--out", type=Path, help="methods.md there, likewise")
    add("--quiet", action="store_true")
    options = parser.parse_args(typed)
    stem = "methods" if options.model == MODEL else f"methods-{Path(options.model).name.rpartition(':')[2]}"
    options.figures = options.figures or Path(__file__).with_name(f"{stem}.jsonl")
    options.out = options.out or Path(__file__).with_name(f"{stem}.md")
    return options


def all_methods() -> list[Variant]:
    """Every method, and every correction behind the plainest method that it can correct."""
    corrections = [name for name in registry.names() if registry.corrects(name)]
    alone = [Variant(name) for name in registry.names() if name not in corrections]
    return alone + [Variant(f"minmax+{name}") for name in corrections]


def plan_tables(options: argparse.Namespace) -> dict[str, list[Cell]]:
    """Part -> its cells, in the order of the rows."""
    parts, schemes = options.parts.split(","), options.schemes.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise StepquantError(f"unknown part '{unknown[0]}'", expected=", ".join(PARTS))
    chosen = [Variant(name) for name in options.methods.split(",") if name] or all_methods()
    check_used(chosen + EDA_DM + GAC + BIAS, read_settings(options.set))
    out: dict[str, list[Cell]] = {}
    if "methods" in parts:
        out["methods"] = [cell for scheme in schemes for cell in cells(options, chosen, scheme)]
    for part, rows in (("eda_dm", EDA_DM), ("gac", GAC), ("bias", BIAS)):
        if part in parts:
            out[part] = cells(options, rows, MAIN)
    return out


def cells(options: argparse.Namespace, rows: Sequence[Variant], scheme: str) -> list[Cell]:
    evaluation = Evaluation.of(
        images=options.images,
        steps=options.steps,
        batch=options.batch,
        speed=options.speed,
        data=DATA.get(options.model),
    )
    chosen = read_settings(options.set)
    with_chosen = [Variant(row.method, shared(row, chosen) | dict(row.settings), row.label) for row in rows]
    return grid(
        options.model,
        with_chosen,
        [scheme],
        range(options.seeds if scheme in FOUR_BITS else 1),
        evaluation,
        steps=options.calibration_steps or options.steps,
    )


def run_tables(
    options: argparse.Namespace, tables: Mapping[str, list[Cell]], kept: figures.Figures, key: Key
) -> None:
    """Make what is missing; the same cell in two parts is made once."""
    every = [cell for rows in tables.values() for cell in rows]
    missing = [cell for cell in every if key(cell) not in kept]
    start = time.monotonic()
    with Reporter(Console(stderr=True), options.quiet, brief=True) as reporter:
        if missing:
            executor = Processes(options.workers, reporter)
            done = compare(
                missing, options.store, executor=executor, any_code=options.any_code, progress=reporter
            )
            counts = f"{done.made} cells made, {done.found} found, {done.failed} failed"
            reporter.say(f"{counts}, in {clock(time.monotonic() - start)}")
        reporter.say(f"figures of {len(every) - len(missing)} more cells are kept in {options.figures}")


def read_results(
    options: argparse.Namespace, tables: Mapping[str, list[Cell]], key: Key
) -> dict[str, dict[str, Any]]:
    """What the store knows of all cells, failures too, by key of the cell."""
    every = [cell for rows in tables.values() for cell in rows]
    if not options.store.exists():
        return {}
    found = zip(every, known(every, options.store, any_code=options.any_code))
    return {key(cell): result for cell, result in found if result is not None}


def rows_of(
    tables: Mapping[str, list[Cell]], found: Mapping[str, dict[str, Any]], key: Key
) -> dict[str, list[dict[str, Any]]]:
    """What is known of every part, in the order of its rows."""
    keys = {part: [key(cell) for cell in rows] for part, rows in tables.items()}
    return {part: [found[name] for name in names if name in found] for part, names in keys.items()}


def fill(options: argparse.Namespace, made: Mapping[str, list[dict[str, Any]]]) -> str:
    """The file, with the words that were in it."""
    former = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    kept = dict(re.findall(r"<!-- words (\w+) -->\n(.*?)<!-- end -->", former, re.DOTALL))
    titles = {
        "methods": "Methods",
        "eda_dm": f"EDA-DM at {MAIN}: steps and loss",
        "gac": f"Gradient-aligned calibration at {MAIN}: weights",
        "bias": f"Nearest rounding at {MAIN}: its mean error left, and taken back",
    }
    lines = [
        f"# Methods on {options.model}",
        "",
        f"Made by `{command(options)}`.",
        "",
    ]
    lines += [how_measured(options, made), "", *words("all", kept)]
    for part, results in made.items():
        lines += [f"## {titles[part]}", "", *table(results), "", *step_table(results), ""]
        lines += words(part, kept)
    for part in PARTS:
        if part not in made and kept.get(part, "").strip():
            lines += [f"## {titles[part]}", "", "No part of this run.", "", *words(part, kept)]
    return "\n".join(lines).rstrip() + "\n"


def command(options: argparse.Namespace) -> str:
    """What to type for these tables; where files lie and how the work was shared decides nothing."""
    plain = read_options([])
    asked = [
        name
        for name in ("model", "parts", "methods", "schemes", "seeds", "images", "steps", "calibration_steps")
        if getattr(options, name) != getattr(plain, name)
    ]
    typed = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in asked]
    return " ".join(["python benchmarks/methods.py", *typed, *(f"--set {one}" for one in options.set)])


def words(name: str, kept: Mapping[str, str]) -> list[str]:
    return [f"<!-- words {name} -->", kept.get(name, "").rstrip("\n"), "<!-- end -->", ""]


def how_measured(options: argparse.Namespace, made: Mapping[str, list[dict[str, Any]]]) -> str:
    done = [row for rows in made.values() for row in rows if "error" not in row]
    if not done:
        return "No cell is finished."
    first = done[0]
    where, how = first["environment"], first["sampling"]
    processors = ", ".join(sorted({row["environment"]["cpu"] for row in done}))
    distances = (number for number in first["quality"] if number["name"].startswith("FD"))
    extractor = next((number["extractor"] for number in distances if number["extractor"]), "none")
    return (
        f"{first['float']['name']} (digest {first['float']['digest']}), {how['images']:,} images of {how['steps']} "
        f"{how['sampler']} steps ({how['calls']} calls of the denoiser) from the same seeds in every row; calibration over "
        f"{options.calibration_steps or options.steps} steps; features by extractor {extractor}. {processors}, {where['threads']} threads, "
        f"torch {where['torch']}. Seconds and peak memory are those of quantizing, in a process of its own, recording "
        "included; about half of the memory is Python with its libraries. After ±: the standard deviation over seeds "
        "(calibration and images both differ); none where there is one seed. FD falls with the number of images: compare it "
        "at the same number only."
    )


if __name__ == "__main__":
    sys.exit(main())
