"""Learn what the whole network predicts in float: its weights and scales at once, instead of block by block.

No data is needed but states of the float model's own trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.fit.blocks import describe, hold_out, layer_targets, without_gradients
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Sample, Schedule
from stepquant.fit.reconstruct import Report, reconstruct
from stepquant.fit.shape import PROBES, shape_of
from stepquant.fit.streams import Allocation, Piece, Streams, Table
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Progress


class Predicting(nn.Module):
    """A denoiser as a module of the numbers of its records."""

    def __init__(self, denoiser: Denoiser, data: CalibSet) -> None:
        super().__init__()
        self.model, self.denoiser, self.data = denoiser.model, denoiser, data

    def forward(self, records: Tensor) -> Tensor:
        return self.denoiser.predict(self.data.take(records.tolist()).arguments)


def distil(
    streams: Streams,
    schedule: Schedule,
    journal: Journal,
    *,
    stage: str,
    seed: int,
    progress: Progress,
    held: float = 1 / 16,
) -> Report:
    """Learn weights and scales of all blocks together, to predict what the float model predicts."""
    network, piece = streams.network, network_of(streams)
    report = journal.read(stage, piece.path)
    if report is not None:
        return report
    file = journal.file(stage, "checkpoint")
    with without_gradients(network):
        given = Table(piece.arguments, (torch.arange(streams.records),), network.denoiser.device)
        network.switch(weights=False, inputs=False)
        targets = returned(streams, piece, given)
        layers = layer_targets(streams, piece, given, schedule.watch) if schedule.loss.layers else None
        network.switch(weights=True, inputs=True)
        sample = Sample(given, given, targets, *hold_out(streams.records, held), layers=layers)
        report = reconstruct(network, piece, sample, schedule, seed, progress, file)
        journal.write(stage, report)
        file.unlink(missing_ok=True)
        for table in filter(None, (targets, layers)):
            streams.release(table)
    progress.note(describe(report))
    return report


def network_of(streams: Streams) -> Piece:
    """All of the network as one piece."""
    predicting = Predicting(streams.network.denoiser, streams.data)
    few, many = ({"records": torch.arange(size)} for size in PROBES)
    with torch.no_grad():
        some, more = (predicting(**given) for given in (few, many))
    return Piece("", predicting, shape_of(few, many), shape_of(some, more))


def returned(streams: Streams, piece: Piece, given: Table) -> Table:
    table = Allocation(streams, piece.results)
    with torch.no_grad():
        for rows in streams.slices():
            table.put(rows, piece.outputs(given.take(rows)))
    return table.table()
