"""Code: the source that makes a thing, as one digest over all modules that it imports, directly or by others."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from stepquant.version import __version__

PACKAGE = Path(__file__).parents[2]
ROOT = "stepquant."
KERNELS = "stepquant._C"
REGISTRY = "iter_modules"  # how a folder finds what lies in it
DEVICES = "runtime/device.py"  # finds the folders beside it by the names of devices
BODIES = ("body", "orelse", "finalbody", "handlers", "cases")


@cache
def code_digest(modules: tuple[str, ...]) -> str:
    """Over the version and the source of those modules, `methods.minmax`, and of all that they import."""
    total = hashlib.sha256(__version__.encode())
    for name, file in sorted(sources(modules).items()):
        total.update(f"|{name}|".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def sources(modules: Iterable[str]) -> dict[str, Path]:
    """Every file that what those modules do can depend on, by its name. Nothing is imported.

    A folder's `__init__` counts where it is imported itself: what lies in the folder takes nothing from it.
    """
    found: dict[str, Path] = {}
    waiting = [file_of(name) for name in modules]
    while waiting:
        file = waiting.pop()
        if file is None or (name := str(file.relative_to(PACKAGE))) in found:
            continue
        found[name] = file
        text = file.read_text(encoding="utf-8")
        waiting += [file_of(module) for module in imported(text)]
        waiting += file.parent.glob("*.py") if REGISTRY in text else ()
        waiting += file.parent.glob("*/device.py") if name == DEVICES else ()
        found |= kernels() if KERNELS in text else {}
    return found


def file_of(name: str) -> Path | None:
    """Of the longest beginning of a dotted name that is a module; None for the package itself, which only names things."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = PACKAGE.joinpath(*parts[:length])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def imported(text: str) -> frozenset[str]:
    """Dotted names of this package that a source imports anywhere, within functions too."""
    names: list[str] = []
    for node in statements(ast.parse(text).body):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return frozenset(name.removeprefix(ROOT) for name in names if name.startswith(ROOT))


def statements(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Statements and those inside them; expressions, which are most of a tree, hold none."""
    for node in body:
        yield node
        for inner in BODIES:
            yield from statements(getattr(node, inner, ()))


def kernels() -> dict[str, Path]:
    """What the compiled operations are built from, or where there is no source, what was built; by name."""
    root = PACKAGE.parents[1]
    source = [file for pattern in ("setup.py", "csrc/*.cpp", "csrc/*.h") for file in root.glob(pattern)]
    files = source if (root / "csrc").is_dir() else PACKAGE.glob("_C*.so")
    return {f"_C/{file.name}": file for file in files}
