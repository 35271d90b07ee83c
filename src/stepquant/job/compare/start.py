"""Compare: drive the cells, and keep the page up to date with what is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepquant import hub
from stepquant.errors import StepquantError
from stepquant.job.compare.cell import Cell, Origin
from stepquant.job.compare.drive import Drive, Job
from stepquant.job.compare.executor import Executor
from stepquant.job.compare.pages import write_pages
from stepquant.job.compare.processes import Processes
from stepquant.job.compare.query import cell_row
from stepquant.job.compare.store import ERROR, Store, read_found, read_json
from stepquant.job.pipelines import check_one_denoiser, load
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Progress, Silent


@dataclass(frozen=True)
class Compared:
    """Where the page is, and how many cells were found, made, and failed."""

    page: Path
    found: int
    made: int
    failed: int
    results: tuple[dict[str, Any], ...]  # one a cell, in the order of the cells; with `error` where it failed


def compare(
    cells: Sequence[Cell],
    store: Path,
    *,
    out: Path | None = None,
    executor: Executor | None = None,
    any_code: bool = False,
    progress: Progress | None = None,
) -> Compared:
    """Make what is missing of the cells, and write compare.html, compare.md and results.parquet to `out`.

    A finished cell is never made again, a failed one is tried again, a killed one goes on where it was.
    any_code: finished parts count, too, that another version of the code made.
    """
    progress = progress or Silent()
    opened = Store.open(store)
    origin = find_origin(cells)
    jobs = [Job.of(cell, opened, origin, any_code) for cell in cells]
    todo = [job for job in jobs if not job.is_done()]
    folder = out or store
    refresh(jobs, folder, store)
    drive = Drive(todo, executor or Processes(progress=progress))
    for _ in progress.track(drive, f"cells ({len(jobs) - len(todo)} of {len(jobs)} found)", len(todo)):
        refresh(jobs, folder, store)
    results = read_all(jobs)
    failed = sum("error" in found for found in results)
    return Compared(
        folder / "compare.html", len(jobs) - len(todo), len(todo) - failed, failed, tuple(results)
    )


def known(cells: Sequence[Cell], store: Path, *, any_code: bool = False) -> list[dict[str, Any] | None]:
    """Results of the cells as far as they are in the store, without making anything; None where there is nothing yet."""
    opened, origin = Store.open(store, create=False), find_origin(cells)
    jobs = [Job.of(cell, opened, origin, any_code) for cell in cells]
    return [next(iter(read_all([job])), None) for job in jobs]


def refresh(jobs: Sequence[Job], folder: Path, store: Path) -> None:
    """Write the pages about what is known now."""
    write_pages(read_all(jobs), [row_of(job) for job in jobs], folder, store)


def row_of(job: Job) -> dict[str, Any]:
    """The cell in one row, as `stepquant results` has it."""
    known = job.cell.model_dump(mode="json") | {"scheme": job.cell.scheme}
    failed = (read_json(job.places.cell / ERROR) or {}).get("error")
    return cell_row(job.places.cell.name, known, read_found(job.places.cell), failed)


def find_origin(cells: Sequence[Cell]) -> Origin:
    """The one float model of all cells."""
    models = list(dict.fromkeys(cell.recipe.model for cell in cells))
    if len(models) != 1:
        raise StepquantError("a comparison has one model", got=", ".join(models) or "none")
    pipeline = load(models[0])
    check_one_denoiser(pipeline)
    if hub.config_of(Denoiser.of(pipeline).model) is not None:
        raise StepquantError(f"'{models[0]}' is quantized itself", fix="compare on the float model")
    return Origin.of(pipeline, cells)


def read_all(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """What is known of the cells: results, or an error, or nothing yet."""
    found = [read_found(job.places.cell) or failure(job) for job in jobs]
    return [
        known | {"label": job.cell.label, "cell": job.places.cell.name}
        for known, job in zip(found, jobs)
        if known is not None
    ]


def failure(job: Job) -> dict[str, Any] | None:
    known = read_json(job.places.cell / ERROR)
    if known is None:
        return None
    recipe = {"seed": job.cell.recipe.seed}
    named = {"method": job.cell.recipe.method, "scheme": job.cell.scheme, "recipe": recipe}
    return {"error": str(known.get("error")), "quantized": named}
