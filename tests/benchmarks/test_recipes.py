"""Recipes are held to their goals by intervals: met, missed, or open where an interval holds the bound."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import recipes

    yield recipes
    for name in ("recipes", "methods", "method_tables", "figures", "learnt"):
        sys.modules.pop(name, None)


def number(name: str, against: str, value: float, reference: float | None, **rest: float) -> dict[str, Any]:
    found = {"name": name, "against": against, "value": value, "reference": reference, "floor": None}
    return found | dict.fromkeys(("low", "high", "change_low", "change_high")) | rest


def seed(distance: float, half: float, decibels: float = 33.0, right: float = 100.0) -> dict[str, Any]:
    """What is kept of a cell whose float model lies at 1,000, and at 1,030 on other seeds."""
    ends = {"change_low": distance - 1000 - half, "change_high": distance - 1000 + half, "floor": 1030.0}
    least = {"change_low": right - 100 - 0.3, "change_high": right - 100 + 0.3}
    return {
        "size": {"bytes": 145, "float_bytes": 1000},
        "making": {"seconds": 90.0},
        "quality": [
            number("PSNR", "float, same seeds", decibels, None, low=decibels - 0.4, high=decibels + 0.4),
            number("truth", "legal images", 25.0, 25.5, low=24.0, high=26.0),
            number("FD-CH", "float, same seeds", 40.0, None),
            number(
                "FD-CH", "characters test", distance, 1000.0, low=distance - 200, high=distance + 200, **ends
            ),
            number("recognised", "class asked for", right, 100.0, low=99.0, high=100.0, **least),
        ],
    }


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([seed(1010, 15)] * 3, []),
        ([seed(1010, 30)], ["distance open"]),
        ([seed(1010, 30)] * 9, []),  # nine seeds: a third of the width
        ([seed(1060, 15)] * 3, ["distance missed"]),
        ([seed(1000, 5, decibels=32.1)], ["PSNR open"]),
        ([seed(1000, 5, decibels=31.0, right=98.0)], ["PSNR missed", "accuracy missed"]),
    ],
)
def test_goals_of_four_bits(script: Any, made: list[dict[str, Any]], expected: list[str]) -> None:
    assert script.verdicts(script.GOALS["4, 8"], 0.145, made) == expected
    assert script.verdicts(script.GOALS["4, 8"], 0.1451, made) == ["size missed", *expected]


@pytest.mark.parametrize(("distance", "half", "met"), [(1025, 1, True), (1040, 50, True), (1040, 5, False)])
def test_goals_of_eight_bits_are_held_to_noise(script: Any, distance: float, half: float, met: bool) -> None:
    """That of other seeds, 30 here, or that of the measurement."""
    found = script.verdicts(script.GOALS["8, 8"], 0.26, [seed(distance, half, decibels=41)])
    assert found == ([] if met else ["distance missed"])


def test_a_row_says_what_was_measured(script: Any) -> None:
    entry = script.Entry("4, 8", "quest", "auto-4", {"tuned": "all"})
    row = script.row_of("characters", entry, [seed(1010, 15), seed(1030, 15)])
    assert row == (
        "| `characters` | 4, 8 | `quest --scheme auto-4 --set tuned=all` | 2 | 0.1450 | 33.0 ± 0.3 | 1,000, 1,020 | +2.0 ± 1.1 "
        "| 100.0 ± 0.4 | 25.5, 25.0 |  | 1.5 | distance open |"
    )


def test_every_recipe_can_be_asked_for(script: Any) -> None:
    options = script.read_options(["--seeds", "2"])
    for model, entries in script.RECIPES.items():
        assert {entry.bits for entry in entries} == set(script.GOALS)
        assert [len(script.cells_of(model, entry, options)) for entry in entries] == [2] * len(entries)
