"""The ladder and the budgets of the house, read from the source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shape.source import (
    NEIGHBOURS_ALLOWED,
    OUTSIDE,
    PACKAGE,
    RUNGS,
    files,
    functions,
    imported_parts,
    part_of,
    rung,
    shown,
)

MOST_LINES_IN_FILE, MOST_LINES_IN_FUNCTION = 300, 60


def broken_rungs(importer: str, imported: str) -> bool:
    """Whether `importer` may not import `imported`."""
    if importer == imported or (importer, imported) in NEIGHBOURS_ALLOWED:
        return False
    return rung(imported) >= rung(importer)


def test_every_part_of_the_package_stands_on_a_rung() -> None:
    on_ladder = {part for parts in RUNGS for part in parts}
    found = {part_of(file) for file in files()} - set(OUTSIDE)
    assert found == on_ladder


def test_imports_point_down_the_ladder() -> None:
    wrong = [
        f"{shown(file)}:{line} imports {imported}"
        for file in files()
        if part_of(file) not in OUTSIDE
        for line, imported in imported_parts(file)
        if broken_rungs(part_of(file), imported)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("hub", "methods"), ("report", "evaluate"), ("core", "models"), ("errors", "core")],
)
def test_the_ladder_would_notice(importer: str, imported: str) -> None:
    assert broken_rungs(importer, imported)


def test_files_stay_short() -> None:
    lengths = {shown(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files()}
    long = {name: lines for name, lines in lengths.items() if lines >= MOST_LINES_IN_FILE}
    assert not long


def test_functions_stay_short() -> None:
    long = {
        f"{shown(file)}:{line} {name}": lines
        for file in files()
        for name, line, lines in functions(file)
        if lines >= MOST_LINES_IN_FUNCTION
    }
    assert not long


def test_the_source_is_found() -> None:
    assert len(files()) > 30
    assert all(isinstance(file, Path) and file.is_relative_to(PACKAGE) for file in files())
