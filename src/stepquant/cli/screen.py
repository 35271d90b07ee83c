"""Screen: results on stdout, everything said on the way on stderr."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from stepquant.calib.cache import atomically
from stepquant.cli.reporter import Reporter
from stepquant.runtime import ops

PLAIN = "the steps between layers run in plain torch, slower"


class Screen:
    """Where one command shows its progress and its result."""

    def __init__(self, quiet: bool = False, brief: bool = False) -> None:
        self.out = Console(highlight=False)
        self.reporter = Reporter(Console(stderr=True, highlight=False), quiet, brief)

    def say(self, words: str) -> None:
        """On the way: not part of the result."""
        self.reporter.say(words)

    def warn_if_plain(self) -> None:
        if (why := ops.why_plain()) is not None:
            self.say(f"note: {why}; {PLAIN}")

    def show(self, words: str = "") -> None:
        """Part of the result."""
        self.out.print(words, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Numbers to the right, words to the left."""
        rows = [[cell_text(cell) for cell in row] for row in rows]
        if not self.out.is_terminal:
            self.plain_table(title, columns, rows)
            return
        table = Table(
            title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False
        )
        for index, name in enumerate(columns):
            numbers = bool(rows) and all(looks_numeric(row[index]) for row in rows)
            table.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.out.print(table, markup=False)

    def plain_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns of any width, for pipes and files."""
        widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
        for line in ([[title]] if title else []) + [list(columns), *rows]:
            self.show("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())

    def finish(self, file: Path | None, result: Mapping[str, Any]) -> None:
        """The result as JSON, if the user asked for it."""
        if file is None:
            return
        text = json.dumps(result, indent=2, default=str) + "\n"
        for stream in (sys.stdout, sys.stderr):
            if is_same(file, stream):  # /dev/stdout, which may be a file by now: behind what stands in it
                stream.write(text)
                return
        atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def is_same(file: Path, stream: TextIO) -> bool:
    """Whether writing to `file` is writing to `stream`."""
    try:
        return os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    except (OSError, ValueError):
        return False


def cell_text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else str(cell)


def looks_numeric(text: str) -> bool:
    return not text or text.lstrip("-")[:1].isdigit()


def size_text(count: float) -> str:
    """Bytes for people."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )


def command_text(words: Sequence[str]) -> str:
    return shlex.join(["stepquant", *words])
