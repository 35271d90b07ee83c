"""Reconstruct a whole model, block by block in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stepquant.errors import CalibrationError
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Sample, Schedule
from stepquant.fit.reconstruct import Report, reconstruct
from stepquant.fit.streams import Piece, Streams
from stepquant.progress import Progress, Silent
from stepquant.quant.insert import Inserted

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
    held: float = 1 / 16,
    weigh: Weigh | None = None,
    progress: Progress | None = None,
) -> list[Report]:
    """Every block sees inputs from the quantized blocks before it and is fitted to the float model's outputs.

    `activations` says whether activations are quantized meanwhile; `held` is the share of records kept for judging.
    """
    network, progress = streams.network, progress or Silent()
    train, kept = hold_out(streams.records, held)
    reports = []
    streams.restart()
    with without_gradients(network):
        for number, piece in enumerate(
            progress.track(streams.pieces, f"reconstructing {stage}", len(streams.pieces))
        ):
            network.switch(weights=False, inputs=False)
            floats = streams.inputs(piece, quantized=False)
            targets = streams.done[False].get(piece.path) or streams.advance(piece, floats, quantized=False)
            network.switch(weights=True, inputs=activations)
            quants = streams.inputs(piece, quantized=True)
            report = journal.read(stage, piece.path)
            if report is None:
                sample = Sample(floats, quants, targets, train, kept)
                if weigh is not None:
                    sample = sample.weighted(weigh(network, piece, sample, seed + number))
                report = reconstruct(network, piece, sample, schedule, seed + number)
                journal.write(stage, report)
            streams.advance(piece, quants, quantized=True)
            streams.release(floats)
            streams.release(quants)
            reports.append(report)
            progress.note(describe(report))
    return reports


def hold_out(records: int, share: float) -> tuple[Tensor, Tensor]:
    """Record numbers to learn from and to judge by; records come shuffled."""
    kept = max(round(records * share), 1)
    if kept >= records:
        raise CalibrationError(
            "too few calibration records to hold some out", got=records, expected=f"more than {kept}"
        )
    numbers = torch.arange(records)
    return numbers[:-kept], numbers[-kept:]


def describe(report: Report) -> str:
    ratio = report.hard / report.nearest if report.nearest else 1.0
    return f"{report.path}: loss {report.hard:.3g}, {ratio:.0%} of nearest, soft-hard gap {report.gap:.2g}"


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
