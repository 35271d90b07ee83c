"""The ladder and the budgets of the house, read from the source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shape.source import (
    APART,
    CROSSES,
    INSIDE,
    NEIGHBOURS_ALLOWED,
    OUTSIDE,
    PACKAGE,
    RUNGS,
    files,
    functions,
    imported,
    name_of,
    part_of,
    room_of,
    rung,
    shown,
)

MOST_LINES_IN_FILE, MOST_LINES_IN_FUNCTION = 300, 60


def broken_rungs(importer: str, imported: str) -> bool:
    """Whether the module `importer` may not import the module `imported`."""
    above, below = importer.partition(".")[0], imported.partition(".")[0]
    if above == below:
        return broken_inside(importer, imported)
    if (above, below) in NEIGHBOURS_ALLOWED or (importer, imported) in CROSSES:
        return False
    apart = any(above in one and below in other for one, other in (APART, APART[::-1]))
    return apart or not below or rung(below) >= rung(above)


def broken_inside(importer: str, imported: str) -> bool:
    """The same within one folder; its own `__init__` names what users may import, and is imported by none of it."""
    part = importer.partition(".")[0]
    if part not in INSIDE or importer == part:
        return False
    above, below = room_of(importer), room_of(imported)
    if above == below:
        return False
    return above is None or below is None or rung(below, INSIDE[part]) >= rung(above, INSIDE[part])


def wrong_imports() -> list[str]:
    return [
        f"{shown(file)}:{line} imports {module or 'the root of the package'}"
        for file in files()
        if part_of(file) not in OUTSIDE
        for line, module in imported(file)
        if broken_rungs(name_of(file), module)
    ]


def test_every_part_of_the_package_stands_on_a_rung() -> None:
    on_ladder = {part for parts in RUNGS for part in parts}
    found = {part_of(file) for file in files()} - set(OUTSIDE)
    assert found == on_ladder


@pytest.mark.parametrize("part", INSIDE)
def test_every_room_stands_on_a_rung_inside(part: str) -> None:
    names = {name_of(file) for file in files() if part_of(file) == part} - {part}
    assert not {name for name in names if room_of(name) is None}
    assert {room_of(name) for name in names} == {room for rooms in INSIDE[part] for room in rooms}


def test_imports_point_down_the_ladder() -> None:
    wrong = wrong_imports()
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("hub", "methods"),
        ("report.page", "evaluate"),
        ("core.grid", "models.denoiser"),
        ("errors", "core.grid"),
        ("job.recipe", ""),
        ("fit.blocks", "runtime.ops"),
        ("hub", "quant.plan"),
        ("evaluate.networks.lpips", "evaluate.metrics.sets"),
        ("evaluate.metrics.pairs", "evaluate.networks.reader"),
        ("evaluate.speed.calls", "evaluate"),
        ("runtime.layers.layer", "runtime.lower"),
        ("runtime.cpu.products", "runtime.layers.layer"),
        ("models.denoiser", "models.blocks.structure"),
    ],
)
def test_the_ladder_would_notice(importer: str, imported: str) -> None:
    assert broken_rungs(importer, imported)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("evaluate.networks.lpips", "evaluate.metrics.pairs"),
        ("evaluate.metrics.sets", "evaluate.metrics.number"),
        ("runtime.cpu.replay", "runtime.cpu.products"),
        ("schema", "errors"),
        ("methods.correction", "runtime.lower"),
    ],
)
def test_the_ladder_lets_pass_what_points_down(importer: str, imported: str) -> None:
    assert not broken_rungs(importer, imported)


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
    assert any(module == "evaluate.metrics.pairs" for file in files() for _, module in imported(file))
