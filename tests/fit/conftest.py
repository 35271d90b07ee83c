"""A small model with weight ranges set, its records and its streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search
from stepquant.fit.blocks import hold_out, layer_targets
from stepquant.fit.learner import Sample
from stepquant.fit.ranges import set_weight_ranges
from stepquant.fit.streams import Streams
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import Inserted, insert
from stepquant.quant.schemes import scheme


@dataclass
class Bench:
    network: Inserted
    data: CalibSet
    streams: Streams

    def samples(self) -> Iterator[tuple[object, Sample]]:
        """Every piece with what it sees behind pieces that round to nearest."""
        train, held = hold_out(len(self.data), 0.25)
        for piece in self.streams.pieces:
            self.network.switch(weights=False, inputs=False)
            floats = self.streams.inputs(piece, quantized=False)
            targets = self.streams.advance(piece, floats, quantized=False)
            layers = layer_targets(self.streams, piece, floats)
            self.network.switch(weights=True, inputs=False)
            quants = self.streams.inputs(piece, quantized=True)
            yield piece, Sample(floats, quants, targets, train, held, layers=layers)
            self.network.switch(weights=True, inputs=False)
            self.streams.advance(piece, quants, quantized=True)


@pytest.fixture
def bench(source: Source, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bits = getattr(request, "param", "w4a8")
    data = source.record(every(8, (0, 3, 6, 9)))
    with (
        insert(Denoiser.of(source.pipeline), scheme(bits)) as network,
        Streams(network, data, source.cache, batch=12) as streams,
    ):
        set_weight_ranges(network, partial(lp_search, p=2.4))
        yield Bench(network, data, streams)
