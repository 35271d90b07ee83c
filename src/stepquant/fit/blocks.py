"""Reconstruct a whole model, block by block in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.errors import CalibrationError
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Sample, Schedule, inside, watch_layers, watched_layers
from stepquant.fit.reconstruct import Report, reconstruct
from stepquant.fit.shape import Shape
from stepquant.fit.streams import Allocation, Piece, Streams, Table
from stepquant.progress import Progress, Silent
from stepquant.quant.insert import Inserted

FEWEST, MOST = 0.8, 3.0  # times the iterations that all pieces would have

Fit = Callable[[Piece, Sample, int], Report]  # block, what it sees, seed
Weigh = Callable[
    [Inserted, Piece, Sample, int], Tensor
]  # network, block, what it sees, seed -> weight per record


def reconstruct_blocks(
    streams: Streams,
    schedule: Schedule,
    journal: Journal,
    *,
    stage: str,
    activations: bool,
    seed: int = 0,
    held: float | Tensor = 1 / 16,
    weigh: Weigh | None = None,
    progress: Progress | None = None,
) -> list[Report]:
    """Learn roundings and steps of every block, to return what the float model returns."""

    shares = share_iterations(sizes_of(streams), schedule)

    def fit(piece: Piece, sample: Sample, seed: int) -> Report:
        if schedule.loss.layers:
            sample = replace(sample, layers=layer_targets(streams, piece, sample.floats, schedule.watch))
            streams.network.switch(weights=True, inputs=activations)
        if weigh is not None:
            sample = sample.weighted(weigh(streams.network, piece, sample, seed))
        report = reconstruct(
            streams.network, piece, sample, replace(schedule, iterations=shares[piece.path]), seed
        )
        if weigh is not None and sample.weights is not None:
            learnt = sample.weights[sample.train]
            report = replace(report, weights=[learnt.min().item(), learnt.max().item()])
        if sample.layers is not None:
            streams.release(sample.layers)
        return report

    return fit_blocks(
        streams, fit, journal, stage=stage, activations=activations, seed=seed, held=held, progress=progress
    )


def sizes_of(streams: Streams) -> dict[str, int]:
    """How many weights every piece has that may be quantized."""
    layers = streams.network.layers
    found = {piece.path: inside(layers, *piece.covers).values() for piece in streams.pieces}
    return {path: sum(layer.weight.numel() for layer in some) for path, some in found.items()}


def share_iterations(sizes: Mapping[str, int], schedule: Schedule) -> dict[str, int]:
    """Iterations of every piece: more where weights are few, which take longest to decide and cost least.

    Large ones give a fifth of theirs for it at most.
    """
    mean = sum(sizes.values()) / max(len(sizes), 1)
    factors = {path: (mean / max(size, 1)) ** schedule.by_size for path, size in sizes.items()}
    return {path: round(schedule.iterations * min(max(f, FEWEST), MOST)) for path, f in factors.items()}


def fit_blocks(
    streams: Streams,
    fit: Fit,
    journal: Journal,
    *,
    stage: str,
    activations: bool,
    seed: int = 0,
    held: float | Tensor = 1 / 16,
    progress: Progress | None = None,
) -> list[Report]:
    """Every block is fitted with inputs from the quantized blocks before it, and with the float model's outputs.

    `activations` says whether activations are quantized meanwhile; `held` are the records kept for judging, or their share.
    """
    network, progress = streams.network, progress or Silent()
    train, kept = hold_out(streams.records, held)
    reports = []
    streams.restart()
    with without_gradients(network):
        for number, piece in enumerate(
            progress.track(streams.pieces, f"fitting {stage}", len(streams.pieces))
        ):
            network.switch(weights=False, inputs=False)
            floats = streams.inputs(piece, quantized=False)
            targets = streams.done[False].get(piece.path) or streams.advance(piece, floats, quantized=False)
            network.switch(weights=True, inputs=activations)
            quants = streams.inputs(piece, quantized=True)
            report = journal.read(stage, piece.path)
            if report is None:
                report = fit(piece, Sample(floats, quants, targets, train, kept), seed + number)
                journal.write(stage, report)
            streams.advance(piece, quants, quantized=True)
            streams.release(floats)
            streams.release(quants)
            reports.append(report)
            progress.note(describe(report))
    return reports


def layer_targets(streams: Streams, piece: Piece, floats: Table, roles: Sequence[str] = ()) -> Table | None:
    """What the layers of a block that count in its loss return in float; computed once, not in every iteration."""
    layers = watched_layers(piece, roles)
    if not layers:
        return None
    streams.network.switch(weights=False, inputs=False)
    table = Allocation(streams, Shape.of_list([1] * len(layers)), floats.rows)
    with torch.no_grad():
        for rows in streams.slices(floats.rows):
            table.put(rows, watch_layers(piece, layers, floats.take(rows)).layers)
    return table.table()


def hold_out(records: int, share: float | Tensor) -> tuple[Tensor, Tensor]:
    """Record numbers to learn from and to judge by: the last ones, as records come shuffled, or those given."""
    if isinstance(share, Tensor):
        others = torch.ones(records, dtype=torch.bool)
        others[share] = False
        return others.nonzero().flatten(), share
    kept = max(round(records * share), 1)
    if kept >= records:
        raise CalibrationError(
            "too few calibration records to hold some out",
            got=records,
            expected=f"more than {kept}",
            fix="record more samples, or hold out a smaller share",
        )
    numbers = torch.arange(records)
    return numbers[:-kept], numbers[-kept:]


def of_last_trajectories(data: CalibSet, share: float) -> Tensor:
    """The records of a share of the trajectories, so that every step that was recorded has as many of them."""
    trajectories = data.trajectories()
    known = trajectories.unique()
    _, kept = hold_out(len(known), share)
    return torch.isin(trajectories, known[kept]).nonzero().flatten()


def describe(report: Report) -> str:
    ratio = report.hard / report.nearest if report.nearest else 1.0
    said = f"{report.path or 'network'}: loss {report.hard:.3g}, {ratio:.0%} of nearest, soft-hard gap {report.gap:.2g}, {report.iterations} iterations"
    if report.weights:
        said += f", sample weights {report.weights[0]:.2f} to {report.weights[1]:.2f}"
    return said


@contextmanager
def without_gradients(network: Inserted) -> Iterator[None]:
    """Only what is learnt gets gradients, not the model's own parameters."""
    wanted = [parameter for parameter in network.denoiser.model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
