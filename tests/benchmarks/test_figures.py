"""Figures behind the table of methods are kept: a cell whose figures are there is not measured again and makes the same row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures
from stepquant.errors import StepquantError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "methods.py"
ASKED = "--parts methods --methods minmax --schemes w8a8 --images 4 --steps 2 --batch 4 --set samples=4 --any-code"


def made(folder: Path, *more: str) -> str:
    """The file that the script writes, its tables and words."""
    out = folder / "methods.md"
    where = ["--out", str(out), "--figures", str(folder / "methods.jsonl")]
    subprocess.run([sys.executable, str(SCRIPT), *ASKED.split(), *where, *more], check=True, timeout=300)
    return out.read_text()


def test_a_cell_whose_figures_are_kept_is_not_measured_again(tmp_path: Path) -> None:
    first = made(tmp_path, "--store", str(tmp_path / "first"))
    kept = (tmp_path / "methods.jsonl").read_text()
    assert "| w8a8 | minmax | 1 |" in first
    assert "Made by `python benchmarks/methods.py --parts methods --methods minmax --schemes w8a8" in first
    assert str(tmp_path) not in first
    assert str(tmp_path) not in kept
    # Nothing is made: the second store stays without a cell, and the file is the same to the byte.
    assert made(tmp_path, "--store", str(tmp_path / "second")) == first
    assert not (tmp_path / "second").exists()
    assert (tmp_path / "methods.jsonl").read_text() == kept


def test_figures_of_another_model_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "figures.jsonl"
    row = {"cell": "0f", "float": {"digest": "a"}, "label": "minmax"}
    file.write_text(json.dumps(row) + "\n")
    assert list(figures.read(file, "a")) == ["0f"]
    assert figures.read(file, "b") == {}


def test_a_damaged_file_is_one_error_that_says_which(tmp_path: Path) -> None:
    file = tmp_path / "figures.jsonl"
    file.write_text('{"cell": "0f", "float"')
    with pytest.raises(StepquantError, match="kept figures cannot be read"):
        figures.read(file, "a")
