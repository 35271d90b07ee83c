"""What a run store holds as tables: a row for each cell, for each of its numbers, and for each denoising step."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepquant.calib.cache import atomically
from stepquant.errors import StepquantError
from stepquant.evaluate.metrics.classifiers import ASKED
from stepquant.evaluate.metrics.number import OTHER_SEEDS
from stepquant.evaluate.metrics.sets import CLASSES
from stepquant.evaluate.metrics.singles import PROMPTS
from stepquant.evaluate.metrics.truth import LEGAL
from stepquant.job.compare.store import CELL, ERROR, Store, read_found, read_json

Row = Mapping[str, Any]
TEXT = ("cell", "label", "method", "settings", "scheme", "model", "sampler", "state", "error", "unavailable")
NUMBER = (
    *("name", "against", "n", "value", "low", "high", "reference", "floor", "better", "unit"),
    *("extractor", "resize", "unavailable"),
)
BESIDE = ("reference", "floor", "extractor", "unavailable")  # a number, in columns of their own
SIDES = (
    *((OTHER_SEEDS, "others"), ("float", "float")),
    *((name, name.split()[0]) for name in (CLASSES, PROMPTS, ASKED, LEGAL)),
)
RECIPE_KEYS = {"method", "settings", "seed", "model"}
EVALUATION_KEYS = {"images", "steps", "sampler"}
HEADLINES = (
    *("label", "scheme", "seed", "bytes", "seconds", "peak_bytes", "psnr_float", "psnr_float_floor"),
    *("truth_legal", "truth_legal_reference", "recognised_class", "recognised_class_reference"),
    *("fd_ch_float", "fd_ch_float_floor", "fd_ch_data", "fd_ch_data_floor"),
    *("fd_c10_float", "fd_c10_float_floor", "fd_c10_data", "fd_c10_data_floor", "noise_error", "error"),
)


@dataclass(frozen=True)
class Tables:
    """Rows by the name of their table."""

    results: tuple[Row, ...]
    numbers: tuple[Row, ...]
    steps: tuple[Row, ...]


def read_tables(store: Store) -> Tables:
    """Of every cell in a store."""
    results, numbers, steps = [], [], []
    for folder in store.cells():
        cell, found = read_json(folder / CELL), read_found(folder)
        if cell is None or not is_cell(cell):
            continue
        failed = (read_json(folder / ERROR) or {}).get("error")
        results.append(cell_row(folder.name, cell, found, failed))
        sampled = sampling(found or {})
        for number in (found or {}).get("quality", ()):
            numbers.append({"cell": folder.name} | {name: number.get(name) for name in NUMBER} | sampled)
        steps += [{"cell": folder.name} | step for step in (found or {}).get("steps", ())]
    return Tables(tuple(results), tuple(numbers), tuple(steps))


def is_cell(found: Row) -> bool:
    """Whether it can have a row; a damaged file has none, until its cell is asked for again."""
    recipe, chosen = found.get("recipe"), found.get("evaluation")
    return (
        {"label", "scheme"}.issubset(found)
        and isinstance(recipe, dict)
        and RECIPE_KEYS.issubset(recipe)
        and isinstance(chosen, dict)
        and EVALUATION_KEYS.issubset(chosen)
    )


def cell_row(name: str, cell: Row, found: Row | None, failed: str | None = None) -> dict[str, Any]:
    """Who it is and what was measured, flat."""
    recipe, chosen = cell["recipe"], cell["evaluation"]
    row = {
        "cell": name,
        "label": cell["label"],
        "method": recipe["method"],
        "settings": json.dumps(recipe["settings"]),
        "scheme": cell["scheme"],
        "seed": recipe["seed"],
        "model": Path(recipe["model"]).name,
        "images": chosen["images"],
        "steps": chosen["steps"],
        "sampler": chosen["sampler"],
        "state": "done" if found else "failed" if failed else "waiting",
        "error": failed,
    }
    return row | (measured(found) if found else {})


def sampling(found: Row) -> dict[str, Any]:
    """The sampler that was really used, and how often it called the denoiser for an image."""
    known = found.get("sampling") or {}
    return {name: known[name] for name in ("sampler", "calls") if name in known}


def measured(found: Row) -> dict[str, Any]:
    """Size, cost of making, speed, and a column for each number: `psnr_float`, `fd_c10_data`, its floor and its network.

    What could not be measured has a column that says why: `fid_float_unavailable`.
    """
    size, making = found.get("size") or {}, found.get("making") or {}
    steps = [step["relative"] for step in found.get("steps", ())]
    speed = [row["ratio"] for row in (found.get("speed") or {}).get("rows", ()) if row["name"] == "stepquant"]
    row = {
        "bytes": size.get("bytes"),
        "float_bytes": size.get("float_bytes"),
        "seconds": making.get("seconds"),
        "peak_bytes": making.get("peak_bytes"),
        "speed": speed[-1] if speed else None,
        "noise_error": statistics.fmean(steps) if steps else None,
    }
    for number in found.get("quality", ()):
        name = column_name(number["name"], number["against"])
        row[name] = number["value"]
        row |= {f"{name}_{key}": number[key] for key in BESIDE if number.get(key) not in (None, "")}
    return row | sampling(found)


def column_name(name: str, against: str) -> str:
    """`FD-C10` against `float, same seeds` is fd_c10_float; against other seeds fd_c10_others; against data fd_c10_data."""
    side = next((short for start, short in SIDES if against.startswith(start)), "data")
    return re.sub(r"\W+", "_", f"{name} {side}".lower())


def arrow_table(rows: Sequence[Row]) -> Any:
    """Columns in the order of their first row; one that is empty has the type that its name asks for."""
    arrow = need("pyarrow")
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["cell"]
    columns = {}
    for name in names:
        column = arrow.array([row.get(name) for row in rows])
        empty = arrow.string() if name in TEXT else arrow.float64()
        columns[name] = column.cast(empty) if arrow.types.is_null(column.type) else column
    return arrow.table(columns)


def write_parquet(rows: Sequence[Row], file: Path) -> None:
    table, parquet = arrow_table(rows), need("pyarrow.parquet")
    atomically(file, lambda temporary: parquet.write_table(table, temporary))


def ask(store: Path, sql: str | None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and rows of a query over the tables `results`, `numbers` and `steps`."""
    duckdb, tables = need("duckdb"), read_tables(Store.open(store, create=False))
    connection = duckdb.connect()
    for name, rows in vars(tables).items():
        connection.register(name, arrow_table(rows))
    try:
        found = connection.execute(sql or default_sql(tables.results))
        return [column[0] for column in found.description or ()], found.fetchall()
    except duckdb.Error as error:
        raise StepquantError(
            f"the query cannot be answered: {error}",
            expected="SQL over the tables results, numbers and steps",
            fix='see their columns: stepquant results --sql "describe results"',
        ) from error


def default_sql(rows: Iterable[Row]) -> str:
    known = {name for row in rows for name in row}
    return f"select {', '.join(name for name in HEADLINES if name in known) or '*'} from results order by all"


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StepquantError(
            f"this needs {module.partition('.')[0]}, which is not installed",
            fix="pip install 'stepquant[compare]'",
        ) from error
