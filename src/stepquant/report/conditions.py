"""What numbers of many runs were measured on, and what could not be measured: without it no number compares with another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stepquant.report import tables
from stepquant.report.columns import Entry
from stepquant.schema import Number, Report


def conditions(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Images, sampler, calls, network and resize -> names of the numbers that share them."""
    return grouped((tables.measured_on(x, run), x.name) for run, x in numbers(entries) if x.value is not None)


def unavailable(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """What it would take -> names of the numbers that no run has."""
    measured = {(x.name, x.against) for _, x in numbers(entries) if x.value is not None}
    absent = (x for _, x in numbers(entries) if x.unavailable and (x.name, x.against) not in measured)
    return grouped((x.unavailable, x.name) for x in absent)


def sentences(entries: Sequence[Entry]) -> list[str]:
    """Both as lines of text."""
    known = [f"{', '.join(names)}: {what}" for what, names in conditions(entries).items()]
    return known + [f"{', '.join(names)} unavailable: {why}" for why, names in unavailable(entries).items()]


def numbers(entries: Sequence[Entry]) -> list[tuple[Report, Number]]:
    return [(run, number) for entry in entries for run in entry.runs for number in run.quality]


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by key, each once, in the order in which they first occur."""
    found: dict[str, dict[str, None]] = {}
    for key, name in pairs:
        found.setdefault(key, {})[name] = None
    return {key: list(names) for key, names in found.items()}
