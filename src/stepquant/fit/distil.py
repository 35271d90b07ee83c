"""Learn what the whole network predicts in float: its weights and scales at once, instead of block by block.

No data is needed but states of the float model's own trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.calib.guided import State, alone, read_by_sampler
from stepquant.fit.blocks import describe, hold_out, layer_targets, without_gradients
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Sample, Schedule
from stepquant.fit.reconstruct import Report, reconstruct
from stepquant.fit.shape import PROBES, shape_of
from stepquant.fit.streams import Allocation, Piece, Streams, Table
from stepquant.progress import Progress
from stepquant.quant.insert import Inserted


class Predicting(nn.Module):
    """A denoiser as a module of the numbers of its states: what it predicts, and before it what the sampler reads of that."""

    def __init__(self, network: Inserted, data: CalibSet, states: Sequence[State]) -> None:
        super().__init__()
        self.model, self.network, self.data, self.states = network.denoiser.model, network, data, states

    def forward(self, numbers: Tensor) -> list[Tensor]:
        states = [self.states[number] for number in numbers.tolist()]
        records = [record for state in states for record in state.records]
        self.network.at(torch.tensor(records))
        predicted = self.network.denoiser.predict(self.data.take(records).arguments)
        if len(records) == len(states):
            return [predicted]
        # What each prediction is counts as well: it bounds what another guidance makes of them.
        read, first = (
            read_by_sampler(predicted.float(), some).flatten(0, 1) for some in (states, firsts(states))
        )
        return [read, read - first, predicted]


def firsts(states: Sequence[State]) -> list[State]:
    """States of which the sampler reads the first prediction alone."""
    return [replace(one, factors=(1.0, *[0.0] * (len(one.factors) - 1))) for one in states]


def distil(
    streams: Streams,
    schedule: Schedule,
    journal: Journal,
    *,
    stage: str,
    seed: int,
    progress: Progress,
    held: float = 1 / 16,
    states: Sequence[State] = (),
) -> Report:
    """Learn weights and scales of all blocks together, to predict what the float model predicts.

    With `states`, to err least in what the sampler reads of it.
    """
    states = states or alone(streams.records)
    network, piece = streams.network, network_of(streams, states)
    schedule = replace(schedule, batch=max(schedule.batch * len(states) // streams.records, 1))
    report = journal.read(stage, piece.path)
    if report is not None:
        return report
    file = journal.file(stage, "checkpoint")
    with without_gradients(network):
        given = Table(piece.arguments, (torch.arange(len(states)),), network.denoiser.device)
        network.switch(weights=False, inputs=False)
        targets = returned(streams, piece, given)
        layers = layer_targets(streams, piece, given, schedule.watch) if schedule.loss.layers else None
        network.switch(weights=True, inputs=True)
        sample = Sample(given, given, targets, *hold_out(len(states), held), layers=layers)
        report = reconstruct(network, piece, sample, schedule, seed, progress, file)
        journal.write(stage, report)
        file.unlink(missing_ok=True)
        for table in filter(None, (targets, layers)):
            streams.release(table)
    progress.note(describe(report))
    return report


def network_of(streams: Streams, states: Sequence[State]) -> Piece:
    """All of the network as one piece."""
    predicting = Predicting(streams.network, streams.data, states)
    few, many = ({"numbers": torch.arange(size)} for size in PROBES)
    with torch.no_grad():
        some, more = (predicting(**given) for given in (few, many))
    return Piece("", predicting, shape_of(few, many), shape_of(some, more))


def returned(streams: Streams, piece: Piece, given: Table) -> Table:
    table = Allocation(streams, piece.results, given.rows)
    with torch.no_grad():
        for rows in streams.slices(given.rows):
            table.put(rows, piece.outputs(given.take(rows)))
    return table.table()
