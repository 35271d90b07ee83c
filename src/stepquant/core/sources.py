"""Which sources decide what a module does: its own, and those of all that it imports of this package."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
COMPILED = "_C"
# What is imported by a name that only the running program knows: the folders of devices.
BY_NAME = {"runtime.device": "runtime/*/device.py"}


@cache
def code_digest(modules: tuple[str, ...], package: Path = PACKAGE) -> str:
    """Over the sources that decide what these modules do, those of the compiled operations included."""
    total = hashlib.sha256()
    for file in sources(modules, package):
        inside = file.relative_to(package) if package in file.parents else file.name
        total.update(f"|{inside}|".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def sources(modules: tuple[str, ...], package: Path = PACKAGE) -> list[Path]:
    """Files of the modules (`fit.ranges`) and of all that they import, wherever in a file the import stands."""
    found: dict[Path, None] = {}
    waiting = [file for module in modules for file in files_of(module, package)]
    compiled = False
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = None
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        waiting += sorted(package.glob(BY_NAME[name])) if name in BY_NAME else []
        for module in imported(file, package.name):
            compiled |= module == COMPILED
            waiting += files_of(module, package)
    return sorted(found) + (operations(package) if compiled else [])


def imported(file: Path, root: str) -> Iterator[str]:
    """Names below the package: modules, and what is imported of them, which may be a module itself."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        yield from (name.removeprefix(f"{root}.") for name in names if name.startswith(f"{root}."))


def files_of(module: str, package: Path) -> list[Path]:
    """The module's file, and those of the folders that it lies in; nothing for what is no module."""
    place = package.joinpath(*module.split("."))
    own = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    if not own:
        return []
    folders = [folder for folder in place.parents if package in folder.parents]
    return own + [file for folder in folders if (file := folder / "__init__.py").is_file()]


def operations(package: Path) -> list[Path]:
    """Of the compiled operations: their sources where the package lies beside them, else the extension itself."""
    beside = package.parents[1] / "csrc"
    found = [file for file in beside.glob("*") if file.suffix in (".cpp", ".h")] if beside.is_dir() else []
    return sorted(found or package.glob(f"{COMPILED}.*"))
