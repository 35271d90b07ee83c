"""Two processes in one cache at once: same and different recipes, into one folder and into two.

`python -m tests.torture.caches --count 8 --seed 0`
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.runs import RECIPES, Violations, begin, contents, make_model, undisturbed, wait


def race(
    draw: random.Random,
    model: Path,
    place: Path,
    recipes: tuple[str, str],
    expected: dict[str, dict[str, bytes]],
) -> str:
    """Two at once, each into a folder of its own; what did not hold."""
    outs, cache = (place / "a" / "out", place / "b" / "out"), place / "cache"
    children = []
    for recipe, out in zip(recipes, outs):
        children.append(begin(model, recipe, cache, out))
        time.sleep(draw.random() * 0.3)
    codes = [wait(child) for child in children]
    if codes != [0, 0]:
        return f"{recipes}: exit codes {codes}"
    same = all(contents(out) == expected[recipe] for recipe, out in zip(recipes, outs))
    return "" if same else f"{recipes}: other bytes"


def collide(draw: random.Random, model: Path, place: Path, recipe: str, expected: dict[str, bytes]) -> str:
    """Two at once into one folder: one makes it, the other one is told so and finds it when it comes again."""
    first = begin(model, recipe, place / "cache", place / "out")
    time.sleep(draw.random() * 0.3)
    second = begin(model, recipe, place / "cache", place / "out")
    codes = sorted((wait(first), wait(second)))
    if codes != [0, 2]:
        return f"{recipe} twice into one folder: exit codes {codes}"
    said = (place / "cache.txt").read_text()
    if "another run" not in said:
        return f"{recipe} twice into one folder: the loser is not told why"
    if wait(begin(model, recipe, place / "cache", place / "out", "--resume")) != 0:
        return f"{recipe}: the loser does not find what the winner made"
    return "" if contents(place / "out") == expected else f"{recipe} twice into one folder: other bytes"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, violations, start, pairs = random.Random(options.seed), Violations("caches"), time.time(), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = make_model(root / "tiny")
        expected = undisturbed(model, root)
        for number in range(options.count):
            place = root / str(number)
            place.mkdir()
            recipes = draw.choice(list(RECIPES)), draw.choice(list(RECIPES))
            if number % 3 == 2:
                wrong = collide(draw, model, place, recipes[0], expected[recipes[0]])
            else:
                recipes = (recipes[0],) * 2 if number % 3 == 0 else tuple(RECIPES)[:2]
                wrong = race(draw, model, place, recipes, expected)
            pairs += 1
            violations.check(
                not wrong, f"{wrong}: {(place / 'cache.txt').read_text()[-500:]}" if wrong else ""
            )
    print(
        f"caches: {pairs} pairs of processes in one cache, seed {options.seed}: "
        f"{violations.count} violations, {time.time() - start:.0f} s"
    )
    return min(violations.count, 1)


if __name__ == "__main__":
    sys.exit(main())
