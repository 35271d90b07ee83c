"""Figures behind methods.md, a line of JSON for each measured cell: kept in the repository, so that a table can be made again
without its artifacts and images, and goes on where it stopped on another machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepquant.calib.cache import atomically
from stepquant.core.digest import value_digest
from stepquant.errors import StepquantError
from stepquant.job.compare import Cell
from stepquant.models.denoiser import Denoiser

# What the tables read of a result, by its place there; the rest stays in the store.
KEPT: Mapping[str, tuple[str, ...]] = {
    "float": ("name", "digest"),
    "quantized": ("scheme",),
    "sampling": ("images", "steps", "sampler", "calls", "seed"),
    "environment": ("cpu", "threads", "torch"),
    "size": ("bytes", "float_bytes"),
    "making": ("seconds", "peak_bytes"),
}
NUMBER = (
    "name",
    "against",
    "value",
    "low",
    "high",
    "reference",
    "change_low",
    "change_high",
    "floor",
    "extractor",
)
SHOWN = ("recognised", "truth", "broken", "FD", "PSNR")  # how names of numbers begin that have a column
Figures = dict[str, dict[str, Any]]  # by key of the cell


def key(denoiser: Denoiser, cell: Cell) -> str:
    """Of everything that was asked, with the grids that the scheme gives to this network today; not of the code that answered."""
    decided = cell.recipe.build_plan().resolve(denoiser)
    grids = {f"{path}:{port}": str(decision.grid) for (path, port), decision in decided.items()}
    return value_digest([cell.model_dump(mode="json"), grids])[:16]


def compact(result: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a cell's results that the tables read."""
    kept = {place: {name: result[place][name] for name in names} for place, names in KEPT.items()}
    shown = [number for number in result["quality"] if number["name"].startswith(SHOWN)]
    numbers = [{name: number.get(name) for name in NUMBER} for number in shown]
    steps = [{"relative": step["relative"]} for step in result["steps"]]
    return {"label": result["label"], **kept, "quality": numbers, "steps": steps}


def read(file: Path, digest: str) -> Figures:
    """Those of the float model with this digest; none where there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    try:
        rows = [json.loads(line) for line in lines]
        return {row.pop("cell"): row for row in rows if row["float"]["digest"] == digest}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StepquantError(
            f"the kept figures cannot be read: {error!r}",
            where=str(file),
            expected="a table in JSON a line, as this program writes them",
            fix="take the file from the repository again, or name another one: --figures FILE",
        ) from error


def write(file: Path, figures: Figures) -> None:
    """In an order that another measurement does not turn over."""
    rows = sorted(
        figures.items(),
        key=lambda one: (one[1]["quantized"]["scheme"], one[1]["label"], one[1]["sampling"]["seed"], one[0]),
    )
    text = "".join(json.dumps({"cell": name, **row}, sort_keys=True) + "\n" for name, row in rows)
    atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
