"""From results to what people and programs read: compare.html, compare.md and results.parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepquant.job.compare.query import write_parquet
from stepquant.job.compare.store import ADDED, SENSITIVITY, read_json
from stepquant.job.files import writing
from stepquant.report import compare as write_page
from stepquant.report.compare import measured_on
from stepquant.report.compare import summary as report_summary

SITE_KEYS = {"path", "role", "bits", "metric", "value"}
PARQUET = "results.parquet"


def write_pages(
    results: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], folder: Path, store: Path
) -> None:
    """Write the pages about these cells, nothing while there is none; and their rows, where there is a library for it."""
    if not results:
        return
    with writing(folder):
        write_page([for_page(found) for found in results], folder, sensitivity_rows(store))
        if find_spec("pyarrow") is not None:
            write_parquet(rows, folder / PARQUET)


def for_page(found: Mapping[str, Any]) -> dict[str, Any]:
    """Results as the report reads them: the label of the row in the method's place."""
    kept = {key: value for key, value in found.items() if key not in ADDED}
    return kept | {"quantized": dict(found["quantized"]) | {"method": found["label"]}}


def summary(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The headline columns of every row, for a terminal; first row the header."""
    return report_summary([for_page(found) for found in results])


def circumstances(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers were measured on, and what could not be measured, for a terminal."""
    return measured_on([for_page(found) for found in results])


def sensitivity_rows(store: Path) -> list[Mapping[str, Any]]:
    """Of the studies of single sites that lie in the store, as `stepquant sensitivity --out STORE/sensitivity.json` writes."""
    rows: list[Mapping[str, Any]] = []
    for file in sorted(store.glob(SENSITIVITY)):
        found = (read_json(file) or {}).get("rows", [])
        rows += [row for row in found if isinstance(row, dict) and SITE_KEYS.issubset(row)]
    return rows
