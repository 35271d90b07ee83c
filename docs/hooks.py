"""Pages that lie beside docs/, not in it, become part of the site; links to what is no page lead to the file's text."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md", "csrc/README.md",
          "benchmarks/log.md", "benchmarks/methods.md", "benchmarks/methods-characters-text.md",
          "benchmarks/methods-characters-dit.md")  # fmt: skip
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[#)])")


def places_of(name: str) -> str:
    """Where a file of the repository lies in the site: docs/ is its root, with what lies beside it."""
    return name.removeprefix("docs/")


def on_files(files: Files, config: Any) -> Files:
    for name in BESIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, config: Any, **_: Any) -> str:
    """The same links, seen from the place that the page has in the site; what they show comes along."""
    name = page.file.src_uri
    source = name if name in BESIDE else f"docs/{name}"

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        place = places_of(target)
        if files.get_file_from_path(place) is None and (ROOT / target).is_file():
            files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
        return posixpath.relpath(place, posixpath.dirname(name) or ".")

    return LINK.sub(moved, markdown)
