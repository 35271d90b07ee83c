"""The table of docs/recipes.md: recipes on the embedded models, measured, and held to the goals that they are for.

    python benchmarks/recipes.py                                       every recipe, three seeds (hours)
    python benchmarks/recipes.py --models stepquant:characters         those of one model
    python benchmarks/recipes.py --table                               the table from what is measured, while it runs, too

Interrupt it whenever you like, and run it again to go on. Figures are kept beside this file, a line of JSON for each cell.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import figures
from methods import read_results, run_tables

from stepquant.calib.cache import atomically
from stepquant.errors import StepquantError
from stepquant.evaluate.describe import describe_float
from stepquant.job.compare import Cell, Evaluation, Variant, grid
from stepquant.job.pipelines import load
from stepquant.job.results import DATA
from stepquant.models.denoiser import Denoiser

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
TABLE = re.compile(r"(<!-- table recipes -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Goal:
    """What is asked of the best recipe: at most so much of fp32's size, and so near to the float model."""

    bits: str
    size: float
    # To data, percent above the float model's; None: no more than other seeds of it are.
    distance: float | None
    # Percentage points below the float model's; None: no more than was to be told from 0.
    accuracy: float | None
    decibels: float = 0.0
    broken: float = 100.0  # percent of the images, where the model has no classes


GOALS = {
    goal.bits: goal
    for goal in (
        Goal("8, 8", 0.26, None, None, decibels=40),
        Goal("6, 6", 0.20, 2, 0.5),
        Goal("4, 8", 0.145, 3, 1, decibels=32),
        Goal("4, 4", 0.145, 15, 3),
        Goal("2, 8", 0.085, math.inf, 10, broken=1),
    )
}


@dataclass(frozen=True)
class Entry:
    """A recipe and the goal that it is for."""

    bits: str
    method: str
    scheme: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    policy: str | None = None

    @property
    def words(self) -> str:
        """As one types it."""
        sets = [f"--set {key}={value}" for key, value in self.settings.items()]
        policy = [] if self.policy is None else [f"--policy {self.policy}"]
        return " ".join([self.method, f"--scheme {self.scheme}", *sets, *policy])


STEPS = {"by_step": "always"}
READ = {"guided": True}
LONG = {"gain": True}
LAST = "last=5"
# At 6 and at 4 bits activations have no more of them, on average over products, than w6a6 and w4a4 give them there: first
# and last blocks keep 8, which makes 6.9 and 5.8 on the U-Net, 6.6 and 5.3 on the DiT, 7.0 and 5.9 on the text model.
RECIPES: Mapping[str, tuple[Entry, ...]] = {
    "stepquant:characters": (
        Entry("8, 8", "minmax", "w8a8", STEPS | LONG),
        Entry("6, 6", "quest", "auto-5.9a6.8"),
        Entry("4, 8", "minmax", "auto-4.25", STEPS | LONG),
        Entry("4, 4", "quest", "auto-4.1a5.7"),
        Entry("2, 8", "quest", "auto-2.3", {"tuned": "all"}),
    ),
    "stepquant:characters-dit": (
        Entry("8, 8", "convrot", "auto-7.8"),
        Entry("6, 6", "quest", "auto-5.65a6.5", READ),
        Entry("4, 8", "quest", "auto-4.04", READ | {"along": 4.0}),
        Entry("4, 4", "quest", "auto-4.02a5.2", READ | {"along": 12.0, "intervals": 8}),
        Entry("2, 8", "quest", "auto-2.11", READ | {"intervals": 8, "tuned": "all"}),
    ),
    "stepquant:characters-text": (
        Entry("8, 8", "minmax", "auto-7.75", STEPS, LAST),
        Entry("6, 6", "quest", "auto-5.7a4.7", READ | {"intervals": 10}, LAST),
        Entry("4, 8", "minmax", "auto-4.03", STEPS, LAST),
        Entry("4, 4", "quest", "auto-3.95a3.3", READ | {"intervals": 10}, LAST),
        Entry("2, 8", "quest", "auto-2.1a12", STEPS),
    ),
}


@dataclass(frozen=True)
class Value:
    """A mean over seeds, with half of its 95 % interval."""

    mean: float
    half: float = 0.0

    def within(self, bound: float) -> str:
        """Whether it is at most that: yes, no, or not known where the interval holds the bound."""
        if abs(self.mean - bound) < self.half:
            return "open"
        return "met" if self.mean <= bound else "missed"


def main() -> int:
    options = read_options()
    try:
        rows = [row for model in options.models.split(",") for row in rows_of(model, options)]
        page = options.out.read_text(encoding="utf-8")
        if not TABLE.search(page):
            raise StepquantError("the page has no place for the table", where=str(options.out))
    except StepquantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = "\n".join([*HEAD, *rows])
    text = TABLE.sub(lambda found: f"{found[1]}{lines}\n{found[2]}", page)
    atomically(options.out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return 0


def read_options(typed: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default=",".join(RECIPES))
    add("--bits", default="", help="goals, as '4, 8;2, 8'; all by default")
    add("--seeds", type=int, default=3)
    add("--images", type=int, default=1024)
    add("--steps", type=int, default=25, help="denoising steps of the images and of the calibration")
    add("--batch", type=int, default=64)
    add("--workers", type=int, default=1)
    add("--table", action="store_true", help="write the table from what is in the store, and make nothing")
    add("--any-code", action="store_true", help="keep finished cells that other code made")
    add("--store", type=Path, default=Path("runs/recipes"))
    add("--figures", type=Path, default=Path(__file__).parent, help="the folder of the kept figures")
    add("--out", type=Path, default=PAGE)
    add("--quiet", action="store_true")
    return parser.parse_args(typed)


def rows_of(model: str, options: argparse.Namespace) -> list[str]:
    """Rows of a model's recipes; what is not measured yet is made first, unless the table alone is asked for."""
    if model not in RECIPES:
        raise StepquantError(f"no recipes for '{model}'", expected=", ".join(RECIPES))
    pipeline = load(model)
    short = model.rpartition(":")[2]
    file = options.figures / f"recipes-{short}.jsonl"
    kept = figures.read(file, describe_float(pipeline)["digest"])
    key = partial(figures.key, Denoiser.of(pipeline))
    asked = [one for one in RECIPES[model] if not options.bits or one.bits in options.bits.split(";")]
    cells = {str(index): cells_of(model, one, options) for index, one in enumerate(asked)}
    reading = argparse.Namespace(**{**vars(options), "figures": file})
    try:
        if not options.table:
            run_tables(reading, cells, kept, key)
    finally:
        found = read_results(reading, cells, key)
        kept |= {name: figures.compact(row) for name, row in found.items() if "error" not in row}
        figures.write(file, kept)
    for cell in chain(*cells.values()):
        if "error" in found.get(key(cell), {}):
            print(f"error: {short}, {cell.title}: {found[key(cell)]['error']}", file=sys.stderr)
    made = [[kept[key(cell)] for cell in some if key(cell) in kept] for some in cells.values()]
    return [row_of(short, entry, some) for entry, some in zip(asked, made) if some]


def cells_of(model: str, entry: Entry, options: argparse.Namespace) -> list[Cell]:
    evaluation = Evaluation.of(
        images=options.images, steps=options.steps, batch=options.batch, speed=0.0, data=DATA.get(model)
    )
    variant = Variant(entry.method, entry.settings)
    recipe = {"steps": options.steps, "policy": entry.policy}
    return grid(model, [variant], [entry.scheme], range(options.seeds), evaluation, **recipe)


HEAD = (
    "| model | bits | recipe | seeds | size | PSNR dB | distance: float, here | more, % | recognised, % | truth dB: float, here | broken % | min | goal |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def row_of(model: str, entry: Entry, made: Sequence[Mapping[str, Any]]) -> str:
    """A recipe's row, from the figures of its seeds."""
    size = statistics.fmean(row["size"]["bytes"] / row["size"]["float_bytes"] for row in made)
    decibels, farther = value_of(made, "PSNR", data=False), farther_of(made)
    recognised, broken = value_of(made, "recognised"), value_of(made, "broken")
    cells = [
        f"`{model}`",
        entry.bits,
        f"`{entry.words}`",
        str(len(made)),
        f"{size:.4f}",
        shown(decibels, 1),
        beside(made, "FD", 0),
        shown(farther, 1, sign="+"),
        shown(recognised, 1),
        beside(made, "truth", 1),
        shown(broken, 1),
        f"{statistics.fmean(row['making']['seconds'] for row in made) / 60:.1f}",
        "; ".join(verdicts(GOALS[entry.bits], size, made)) or "met",
    ]
    return f"| {' | '.join(cells)} |"


def verdicts(goal: Goal, size: float, made: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of a goal is not met, or not known: an interval holds the bound."""
    decibels, broken = value_of(made, "PSNR", data=False), value_of(made, "broken")
    farther, gained = farther_of(made), change_of(made, "recognised")
    found = {"size": Value(size).within(goal.size)}
    if decibels is not None:
        found["PSNR"] = Value(-decibels.mean, decibels.half).within(-goal.decibels)
    if goal.distance is None:
        noise = max(noise_of(made), farther.half)
        found["distance"] = "met" if farther.mean <= noise else "missed"
    else:
        found["distance"] = farther.within(goal.distance)
    if gained is not None:
        lost = Value(-gained.mean, gained.half)
        met = goal.accuracy is None and lost.mean <= lost.half
        found["accuracy"] = "met" if met else lost.within(goal.accuracy or 0)
    elif broken is not None:
        found["broken"] = Value(broken.mean).within(goal.broken)
    return [f"{name} {said}" for name, said in found.items() if said != "met"]


def numbers(made: Sequence[Mapping[str, Any]], name: str, *, data: bool = True) -> list[dict[str, Any]]:
    """One of every seed: that against something else than the float model, or against it."""
    return [
        number
        for row in made
        for number in row["quality"]
        if number["name"].startswith(name) and number["against"].startswith("float") != data
    ]


def value_of(made: Sequence[Mapping[str, Any]], name: str, *, data: bool = True) -> Value | None:
    found = numbers(made, name, data=data)
    return together([(one["value"], one["low"], one["high"]) for one in found]) if found else None


def change_of(made: Sequence[Mapping[str, Any]], name: str) -> Value | None:
    found = numbers(made, name)
    changes = [(one["value"] - one["reference"], one["change_low"], one["change_high"]) for one in found]
    return together(changes) if found else None


def farther_of(made: Sequence[Mapping[str, Any]]) -> Value:
    """By how many percent the images lie farther from the data than the float model's of the same seeds."""
    found = numbers(made, "FD")
    return together(
        [
            tuple(
                100 * change / one["reference"]
                for change in (one["value"] - one["reference"], one["change_low"], one["change_high"])
            )
            for one in found
        ]
    )


def noise_of(made: Sequence[Mapping[str, Any]]) -> float:
    """By how many percent other seeds of the float model differ from it in their distance to data."""
    found = numbers(made, "FD")
    return statistics.fmean(100 * abs(one["floor"] / one["reference"] - 1) for one in found)


def together(found: Sequence[Sequence[float]]) -> Value:
    """The mean of values of independent seeds, each with the ends of its interval."""
    halves = [(high - low) / 2 for _, low, high in found]
    return Value(statistics.fmean(value for value, _, _ in found), math.hypot(*halves) / len(halves))


def shown(value: Value | None, places: int, sign: str = "") -> str:
    return "" if value is None else f"{value.mean:{sign},.{places}f} ± {value.half:,.{places}f}"


def beside(made: Sequence[Mapping[str, Any]], name: str, places: int) -> str:
    """The float model's number and this one's, means over seeds."""
    found = numbers(made, name)
    return ", ".join(
        f"{statistics.fmean(one[side] for one in found):,.{places}f}" for side in ("reference", "value")
    )


if __name__ == "__main__":
    sys.exit(main())
