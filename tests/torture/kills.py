"""Random kills of `stepquant quantize`, each resumed: to the bytes of a run that nobody disturbed.

`python -m tests.torture.kills --count 50 --seed 0`
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.torture.runs import RECIPES, Violations, artifact, begin, contents, make_model, undisturbed, wait

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


def kill_once(
    draw: random.Random, model: Path, place: Path, expected: dict[str, dict[str, bytes]], seconds: float
) -> tuple[str, str]:
    """(how it ended, what did not hold)."""
    recipe, number = draw.choice(list(RECIPES)), draw.choice(SIGNALS)
    moment = draw.random() * seconds
    out, cache = place / "out", place / "cache"
    if draw.random() < 0.3:  # a folder that is there, as a mount point is
        out.mkdir()
    child = begin(model, recipe, cache, out)
    time.sleep(moment)
    os.kill(child, number)
    code = wait(child)
    named = f"{recipe}, {number.name} after {moment:.3f} s of {seconds:.1f}"
    left = [path.name for path in (*place.glob(".out*"), *place.glob("out/.stepquant.*"))]
    if code not in (0, CODES[number], -number):
        return named, f"{named}: exit code {code}"
    if number != signal.SIGKILL and left:
        return named, f"{named}: left {left}"
    whole = artifact(contents(out)) == artifact(expected[recipe])
    if (out / "model_index.json").exists() and number != signal.SIGKILL and not whole:
        return named, f"{named}: an incomplete folder"
    if (again := wait(begin(model, recipe, cache, out, "--resume"))) != 0:
        return named, f"{named}: resuming ended with {again}"
    if contents(out) != expected[recipe]:
        return named, f"{named}: other bytes"
    left = [path.name for path in (*place.glob(".out*"), *cache.rglob("*.part"))]
    return ("too late" if code == 0 else number.name), f"{named}: left {left}" if left else ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first kill: each has its own draws"
    )
    options = parser.parse_args()
    found, violations, start = Counter[str](), Violations("kills"), time.time()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = make_model(root / "tiny")
        began = time.time()
        expected = undisturbed(model, root)
        seconds = (time.time() - began) / len(expected)
        for number in range(options.first, options.first + options.count):
            place = root / str(number)
            place.mkdir()
            draw = random.Random(f"{options.seed} {number}")
            ended, wrong = kill_once(draw, model, place, expected, seconds)
            found[ended] += 1
            violations.check(
                not wrong,
                f"number {number}: {wrong}: {(place / 'cache.txt').read_text()[-500:]}" if wrong else "",
            )
    ends = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    print(
        f"kills: {options.count} random kills ({ends}), seed {options.seed} from {options.first}, each resumed to the same bytes: "
        f"{violations.count} violations, {time.time() - start:.0f} s"
    )
    return min(violations.count, 1)


if __name__ == "__main__":
    sys.exit(main())
