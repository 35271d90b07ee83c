"""Every method on every declared network: quantized, saved, loaded, the same bytes predicted; or refused with a reason.

`python -m tests.torture.methods --table docs/networks.md` writes what came of it. `--methods` and `--networks` take some;
`--kept FILE` keeps what was found, so that another run goes on behind it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from stepquant import methods
from stepquant.core import ranges
from stepquant.errors import StepquantError
from stepquant.models import families
from stepquant.models.families.registry import KINDS
from stepquant.progress import Silent
from tests.contracts.pairs import error_of
from tests.models.tiny import CASES
from tests.torture.runs import Violations

MOST_ERROR = 0.6  # of a prediction of random weights: to nearest, the deepest U-Net over videos loses 0.53
# How methods begin to say which part of theirs a network has no place for.
LEFT_OUT = (
    "no skip concatenations",
    "no attention reads",
    "no embedding scales",
    "t enters this model by modulation",
)
BEGIN, END = "<!-- made by tests.torture.methods -->", "<!-- end -->"


@dataclass
class Outcome:
    """Of a method on a network."""

    error: float = 0.0
    refused: str = ""  # why
    left_out: Sequence[str] = ()  # what a method that runs does not do there


@dataclass
class Noting(Silent):
    """Progress that keeps what a method says of what it leaves out."""

    said: list[str] = field(default_factory=list)

    def note(self, words: str) -> None:
        if words.startswith(LEFT_OUT):
            self.said.append(words)


def tried(method: str, network: str, bits: str) -> Outcome:
    heard = Noting()
    with tempfile.TemporaryDirectory() as folder:
        try:
            error = error_of(method, network, bits, Path(folder), heard)
        except StepquantError as refused:
            return Outcome(refused=refused.what)
    return Outcome(error, left_out=tuple(dict.fromkeys(heard.said)))


def search_coarsely() -> None:
    """Few ranges to choose from: which one it is does not matter here."""
    searches: tuple[Any, ...] = (ranges.lp_search, ranges.lp_search_binned)
    for search in searches:
        search.__kwdefaults__ = search.__kwdefaults__ | {"candidates": 3}


def files() -> dict[str, str]:
    """Class of models -> the file that declares it."""
    names = [module.name for module in pkgutil.iter_modules(families.__path__) if module.name not in KINDS]
    loaded = {name: importlib.import_module(f"{families.__name__}.{name}") for name in sorted(names)}
    return {
        model: name for name, file in loaded.items() for family in file.FAMILIES for model in family.models
    }


def classes() -> dict[str, str]:
    """Tiny network -> its class."""
    return {name: type(build()[0]).__name__ for name, build in CASES.items()}


def one_of_each() -> list[str]:
    """A tiny network of every declared class."""
    first: dict[str, str] = {}
    for name, kind in classes().items():
        first.setdefault(kind, name)
    return list(first.values())


class Notes:
    """Reasons, numbered in the order in which they are first given."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, reasons: Iterable[str]) -> str:
        told = list(dict.fromkeys(without_names(one) for one in reasons))
        self.words += [one for one in told if one not in self.words]
        return f" ({', '.join(str(self.words.index(one) + 1) for one in told)})"


def without_names(words: str) -> str:
    return re.sub(r"'[^']*\.[^']*'", "a layer", words)


def cell(outcomes: Mapping[str, Outcome], notes: Notes) -> str:
    """What a method comes to on the networks of one file, by class."""
    runs = [name for name, one in outcomes.items() if not one.refused]
    refused = [name for name in outcomes if name not in runs]
    why = notes(outcomes[name].refused for name in refused)
    if not runs:
        return f"does not apply{why}"
    if not refused:
        words = "runs"
    elif len(refused) <= len(runs):
        words = f"runs, but for {', '.join(refused)}{why}"
    else:
        words = f"runs on {', '.join(runs)} alone{why}"
    parts: dict[str, list[str]] = defaultdict(list)
    for name in runs:
        for one in outcomes[name].left_out:
            parts[one].append(name)
    for one, names in parts.items():
        words += f"; in part{'' if names == runs else ' on ' + ', '.join(names)}{notes([one])}"
    return words


def table(found: Mapping[tuple[str, str], Outcome]) -> str:
    kinds, own, notes = classes(), files(), Notes()
    by_file: dict[str, list[str]] = defaultdict(list)
    for network in dict.fromkeys(network for _, network in found):
        by_file[own[kinds[network]]].append(network)
    heads = ["method", *(f"`{file}`" for file in by_file)]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for method in dict.fromkeys(method for method, _ in found):
        cells = [cell({kinds[one]: found[method, one] for one in mine}, notes) for mine in by_file.values()]
        lines.append(" | ".join([f"`{'+' * methods.corrects(method)}{method}`", *cells]))
    told = [f"{number}. {words}" for number, words in enumerate(notes.words, 1)]
    tried_on = [f"- `{file}`: {', '.join(kinds[one] for one in mine)}" for file, mine in by_file.items()]
    missing = sorted(set(own) - {kinds[one] for mine in by_file.values() for one in mine})
    left = [f"- not run for this table: {', '.join(missing)}"] if missing else []
    return "\n".join([*(f"| {line} |" for line in lines), "", *told, "", "Networks:", "", *tried_on, *left])


def write(page: Path, text: str) -> None:
    """Between the two marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def read(kept: Path | None) -> dict[tuple[str, str], Outcome]:
    """What a run before has found."""
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    return {(method, network): Outcome(**told) for method, network, told in map(json.loads, lines)}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names: Callable[[str], list[str]] = lambda words: words.split(",")  # noqa: E731
    parser.add_argument("--methods", type=names, default=methods.names())
    parser.add_argument("--networks", type=names, default=one_of_each())
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--table", type=Path, help="page whose table is written anew")
    parser.add_argument("--kept", type=Path)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    search_coarsely()
    start, violations = time.time(), Violations("methods")
    found = read(options.kept)
    for network, method in product(options.networks, options.methods):
        if (method, network) in found:
            continue
        try:
            outcome = found[method, network] = tried(method, network, options.scheme)
        except Exception:
            violations.check(False, f"{method} on {network}\n{traceback.format_exc()}")
            continue
        violations.check(outcome.error < MOST_ERROR, f"{method} on {network} errs by {outcome.error:.2f}")
        if options.kept:
            with options.kept.open("a") as file:
                file.write(json.dumps([method, network, asdict(outcome)]) + "\n")
    refused = sum(bool(one.refused) for one in found.values())
    print(
        f"methods: {len(options.methods)} on {len(options.networks)} networks at {options.scheme}: {refused} refused, "
        f"{violations.count} violations, {time.time() - start:.0f} s"
    )
    if options.table and not violations.count:
        write(
            options.table, table({(m, n): found[m, n] for m, n in product(options.methods, options.networks)})
        )
    return int(violations.count > 0)


if __name__ == "__main__":
    sys.exit(main())
