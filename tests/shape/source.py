"""The package's source as the shape tests read it: files, functions and imports, without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "stepquant"
# Rungs of the ladder, lowest first. What shares a rung never imports its neighbour.
RUNGS: tuple[tuple[str, ...], ...] = (
    ("core", "errors", "progress", "schema", "version"),
    ("models", "artifact"),
    ("quant", "runtime"),
    ("calib", "hub"),
    ("fit",),
    ("methods",),
    ("evaluate", "report"),
    ("job",),
    ("cli",),
)
# Rung 0 has no order among the pure maths and the two files that everything may use.
NEIGHBOURS_ALLOWED = {("core", "errors"), ("core", "progress"), ("schema", "errors")}
OUTSIDE = ("__init__", "__main__")  # they only name what users may import


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def shown(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def part_of(file: Path) -> str:
    """The top-level module or folder that a file belongs to."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def rung(part: str) -> int:
    return next(level for level, parts in enumerate(RUNGS) if part in parts)


def imported_parts(file: Path) -> Iterator[tuple[int, str]]:
    """(line, part of stepquant) for every import in the file, those inside functions included."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(file)}:{node.lineno}: relative imports hide the ladder"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "stepquant" and len(parts) > 1 and is_module(parts[1]):
                yield node.lineno, parts[1]


def is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """(name, line, length in lines) of every function and method."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1
