"""What holds for the words of every command line, whatever the command."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from stepquant.errors import StepquantError

LARGEST_SEED, LARGEST = 2**63 - 1, 2**31 - 1
NARROWEST = 20  # columns that words still can be read in


def check_given(words: Sequence[str]) -> None:
    """An empty word is what a variable of the shell leaves behind that was never set."""
    for before, word in zip(("", *words), words):
        option, equals, value = word.partition("=")
        if not word or (option.startswith("--") and equals and not value):
            raise StepquantError(
                f"the value of {option or before or 'the command'} is empty",
                fix="give one, or leave the option out; an unset variable of the shell may stand there",
            )


def check_values(values: Mapping[str, Any]) -> None:
    """Numbers that a computer can count to."""
    for name, value in values.items():
        most = LARGEST_SEED if name == "seed" else LARGEST
        if isinstance(value, float) and not math.isfinite(value):
            raise StepquantError(f"{option_of(name)} is no finite number", got=value)
        if isinstance(value, int) and abs(value) > most:
            raise StepquantError(f"{option_of(name)} is too large", got=value, expected=f"at most {most}")


def option_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def suit_terminal() -> None:
    """Output that nothing can break: sane widths, and letters that the terminal does not know written as numbers."""
    for name in ("COLUMNS", "LINES"):
        size = os.environ.get(name, "")
        if size.isdigit() and int(size) < NARROWEST:
            del os.environ[name]
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def read_counts(text: str, option: str) -> tuple[int, ...]:
    """`1,8,32` as numbers."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or max(counts) > LARGEST:
        raise StepquantError(
            f"cannot read {option} {text}", expected="positive numbers with commas, as 1,8,32"
        )
    return counts
