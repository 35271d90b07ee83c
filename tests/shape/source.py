"""The package's source as the shape tests read it: files, functions and imports, without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "stepquant"
Rungs = tuple[tuple[str, ...], ...]
# Rungs of the ladder, lowest first. What shares a rung never imports its neighbour.
RUNGS: Rungs = (
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
# What quantizes and what serves meet in the artifact. `methods` lowers what it quantized, to correct what really runs.
APART = ({"quant", "calib", "fit"}, {"runtime", "hub"})
# The one file of serving that quantizes: it is imported only where float weights are rounded while they are loaded.
CROSSES = {("hub.on_load", "quant.plan"), ("hub.on_load", "quant.schemes")}
# The ladders inside: rooms, or single files of a room that stand lower or higher than the rest of it.
INSIDE: dict[str, Rungs] = {
    "models": (
        ("causal",),
        ("families", "split", "attention", "noise", "zoo", "call", "originals"),
        ("interface", "samples"),
        ("products",),
        ("denoiser", "blocks", "tables"),
        ("sampling",),
        ("pipelines",),
        ("generate",),
        ("hooks",),
        ("observe",),
        ("part",),
    ),
    "runtime": (
        ("ops", "finite", "moving", "turns"),
        ("kernel",),
        ("device", "cpu.products"),
        ("cpu.device", "plain"),
        ("layers", "macs"),
        ("steps", "adapters", "parameters"),
        ("blocks", "intact"),
        ("cpu", "policy"),
        ("lower", "coverage"),
        ("cpu.float_layers", "dequantize"),
    ),
    "evaluate": (
        ("metrics.pairs", "twins", "several"),
        ("networks",),
        ("metrics",),
        ("cost", "describe", "disk", "speed", "trajectory"),
        ("results", "study", "parts"),
    ),
}
OUTSIDE = ("__init__", "__main__")  # they only name what users may import


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def shown(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    """`evaluate.metrics.pairs`; a folder's own file has the folder's name."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def part_of(file: Path) -> str:
    """The top-level module or folder that a file belongs to."""
    return name_of(file).partition(".")[0]


def rung(part: str, rungs: Rungs = RUNGS) -> int:
    return next(level for level, parts in enumerate(rungs) if part in parts)


def room_of(name: str) -> str | None:
    """The longest entry of its part's inner ladder that `evaluate.metrics.pairs` lies in."""
    part, _, inner = name.partition(".")
    entries = [entry for parts in INSIDE.get(part, ()) for entry in parts]
    return max((e for e in entries if f"{inner}.".startswith(f"{e}.")), key=len, default=None)


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module of stepquant or "" for the package's root) for every import, those inside functions included."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(file)}:{node.lineno}: relative imports hide the ladder"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *parts = name.split(".")
            if root == "stepquant":
                yield node.lineno, module_in(parts)


def module_in(parts: list[str]) -> str:
    """The longest beginning of a dotted name that is a module."""
    while parts and not is_module(parts):
        parts = parts[:-1]
    return ".".join(parts)


def is_module(parts: list[str]) -> bool:
    place = PACKAGE.joinpath(*parts)
    return place.is_dir() or place.with_suffix(".py").is_file()


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """(name, line, length in lines) of every function and method."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1
