"""Weights that are learnt through their rounding, and a network that learns as one piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Generator, Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.calib.guided import alone, states_of
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import fake_quantize, quantize, scale_and_zero, to_groups
from stepquant.core.grid import Grid
from stepquant.core.losses import BlockLoss
from stepquant.core.ranges import lp_search, lp_search_binned, minmax
from stepquant.core.steps import StepTable
from stepquant.errors import CalibrationError
from stepquant.fit.distil import distil, network_of
from stepquant.fit.journal import Journal
from stepquant.fit.learnable import FixedIntegers, LearnedWeight
from stepquant.fit.learner import Learner, Schedule
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.fit.streams import Streams
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent
from stepquant.quant.insert import Inserted, insert
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.quant.schemes import TIMES, scheme
from tests.conftest import make_one_level
from tests.models.steered import source_of

QUICK = Schedule(
    12, batch=4, rounding_rate=0, penalty=0, weight_rate=0.02, scale_rate=2e-3, checks=6, patience=99
)


def layer_of(grid: str = "int4/channel") -> QuantLayer:
    torch.manual_seed(0)
    made = Quantizer(Grid.parse(grid), Site("l", "q", "weight"))
    layer = QuantLayer(nn.Linear(8, 6).requires_grad_(False), "q", made, None)
    rows = to_groups(layer.weight, made.grid)
    made.set_range(*scale_and_zero(*minmax(rows, made.grid), made.grid))
    made.enabled = True
    return layer


@pytest.mark.parametrize("grid", ["int4/channel", "uint4/channel/asym", "int4/group4"])
@pytest.mark.parametrize("rank", [0, 3, 100])
def test_a_weight_begins_where_it_is_and_is_rounded_with_what_is_added(grid: str, rank: int) -> None:
    layer = layer_of(grid)
    quantizer, nearest = layer.weight_quantizer, layer.weight_values()
    learnt = LearnedWeight(layer, rank, Generator().manual_seed(0))
    assert torch.equal(learnt.values(layer.weight, quantizer), nearest)
    scale, zero_point = (value[:, None] for value in quantizer.range())
    with torch.no_grad():
        for part in learnt.changes:
            part += torch.randn(part.shape, generator=Generator().manual_seed(1))
        learnt.factor *= 1.25
        if rank:
            down, up = learnt.changes
            added = to_groups(up @ down * scale.mean(), quantizer.grid)
            assert torch.linalg.matrix_rank(up @ down) == min(rank, 6)
        else:
            added = learnt.changes[0] * scale
    moved = to_groups(layer.weight, quantizer.grid) + added
    wanted = quantize(moved, scale * 1.25, zero_point, quantizer.grid).reshape(6, 8)
    learnt.settle(layer)
    assert isinstance(layer.rounding, FixedIntegers), "no branch is left beside the integers"
    assert torch.equal(layer.weight_integers(), wanted)
    torch.testing.assert_close(quantizer.range()[0], scale.flatten() * 1.25)
    values = fake_quantize(moved, scale * 1.25, zero_point, quantizer.grid).reshape(6, 8)
    torch.testing.assert_close(layer.weight_values(), values)


def test_a_weight_begins_with_the_integers_that_were_chosen_for_it() -> None:
    layer = layer_of()
    chosen = (layer.weight_integers() + torch.randint(-1, 2, (6, 8))).clamp(-7, 7)
    layer.rounding = FixedIntegers(chosen)
    learnt = LearnedWeight(layer, 0, Generator())
    assert torch.equal(learnt.integers(layer.weight, layer.weight_quantizer), chosen)
    scale = learnt.start.scale
    far = (learnt.weight - chosen * scale).abs() / scale
    moved = learnt.weight != layer.weight
    assert far.max() < 0.5
    assert far[moved].min() > 0.49, "and moves no further than it has to"


def test_an_adapter_learns_at_a_rate_in_proportion_to_the_scale() -> None:
    layer = layer_of()
    network = Inserted(None, None, {"l": layer}, {}, {})  # type: ignore[arg-type]
    piece: Any = type("Piece", (), {"covers": ("l",), "module": layer})
    learner = Learner(network, piece, replace(QUICK, rank=2, weight_scale_rate=0.5), Generator())
    rates = {group["lr"] for group in learner.parameters()}
    mean = float(layer.weight_quantizer.scale.mean())
    assert rates == {QUICK.weight_rate * mean, QUICK.weight_rate, 0.5}
    # What is added is scale * up @ down: a rate for `up` alone would be the scale's for it.
    up, down = learner.weights["l"].changes[1], learner.weights["l"].changes[0]
    with torch.no_grad():
        up += 1.0
    added = learner.weights["l"].changed() - layer.weight
    torch.testing.assert_close(added, mean * up @ down, rtol=1e-4, atol=1e-6)


class Killed(BaseException):
    pass


class Counting(Silent):
    def __init__(self, last: int | None = None) -> None:
        self.learnt, self.last = 0, last

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        for item in items:
            if label == "learning":
                if self.learnt == self.last:
                    raise Killed
                self.learnt += 1
            yield item


def distilled(
    source: Source, folder: Path, schedule: Schedule, progress: Silent
) -> tuple[Any, list[torch.Tensor]]:
    """The report, and all integers and scales behind it."""
    data = source.record(every(3, (0, 4, 9)))
    with (
        insert(Denoiser.of(source.pipeline), scheme("w4a8")) as network,
        Streams(network, data, folder, batch=4) as streams,
    ):
        set_weight_ranges(network, partial(lp_search, candidates=8))
        set_input_ranges(network, data, partial(lp_search_binned, candidates=8))
        journal = Journal(folder, network, data, {})
        report = distil(streams, schedule, journal, stage="s", seed=0, progress=progress)
        made = [layer.weight_integers() for layer in network.layers.values()]
        return report, made + [q.range()[0] for q in network.quantizers()]


@pytest.fixture
def small(source: Source) -> Source:
    source.pipeline.unet = make_one_level()
    return source


def test_the_network_comes_nearer_to_its_predictions_and_a_killed_run_goes_on(
    small: Source, tmp_path: Path
) -> None:
    report, made = distilled(small, tmp_path / "one", QUICK, Silent())
    assert report.hard < report.nearest
    assert report.path == ""
    with pytest.raises(Killed):
        distilled(small, tmp_path / "two", QUICK, Counting(7))
    counting = Counting()
    again, same = distilled(small, tmp_path / "two", QUICK, counting)
    assert counting.learnt == 12 - 6, "from the last look at held-out records, which was behind the sixth"
    assert again == report
    assert all(torch.equal(a, b) for a, b in zip(made, same, strict=True))
    finished, same = distilled(small, tmp_path / "two", QUICK, counting)
    assert (counting.learnt, finished.hard) == (6, report.hard), "the journal knows it"
    assert all(torch.equal(a, b) for a, b in zip(made, same, strict=True))
    assert not list((tmp_path / "two").rglob("checkpoint*"))


def test_a_damaged_checkpoint_is_one_clear_error(small: Source, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        distilled(small, tmp_path, QUICK, Counting(4))
    (file,) = tmp_path.rglob("checkpoint*")
    file.write_bytes(b"torn")
    with pytest.raises(CalibrationError, match="checkpoint of an earlier run is damaged"):
        distilled(small, tmp_path, QUICK, Silent())


def test_chosen_roles_alone_are_learnt_and_watched(small: Source, tmp_path: Path) -> None:
    schedule = replace(QUICK, iterations=2, only=TIMES, watch=TIMES, loss=BlockLoss(layers=1.0), scale_rate=0)
    data = small.record(every(3, (0, 4, 9)))
    with (
        insert(Denoiser.of(small.pipeline), scheme("w4a8")) as network,
        Streams(network, data, tmp_path, batch=4) as streams,
    ):
        set_weight_ranges(network, minmax)
        learner = Learner(network, network_of(streams, alone(len(data))), schedule, Generator())
        timed = {path for path, layer in network.layers.items() if layer.role in TIMES}
        assert set(learner.weights) == timed != set()
        assert [one.role in TIMES for one in learner.watched] == [True] * len(timed)


def test_a_network_that_reads_a_list_of_states_is_one_piece(tmp_path: Path) -> None:
    source = source_of("z_image", tmp_path)
    data = source.record(every(2, range(2)))
    with (
        insert(Denoiser.of(source.pipeline), scheme("w8a16")) as network,
        Streams(network, data, tmp_path, batch=2) as streams,
    ):
        piece = network_of(streams, alone(len(data)))
        with torch.no_grad():
            wanted = network.denoiser.predict(data.take([3, 1]).arguments)
            (found,) = piece.outputs([torch.tensor([3, 1])])
    torch.testing.assert_close(found, wanted)


GUIDANCE = 7.5


def guided(network: Inserted, data: CalibSet, places: list[tuple[int, int]]) -> Tensor:
    """What the sampler reads at these steps of trajectories, as the pipelines of diffusers write it."""
    batch = data.take(range(len(data)))
    network.at(torch.arange(len(data)))
    with torch.no_grad():
        predicted = network.denoiser.predict(batch.arguments)
    rows = {
        (int(t), int(s), int(b)): row
        for t, s, b, row in zip(batch.trajectory, batch.step, batch.branch, predicted)
    }
    return torch.stack([rows[*one, 0] + GUIDANCE * (rows[*one, 1] - rows[*one, 0]) for one in places])


def test_of_a_guided_network_what_the_sampler_reads_is_learnt(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    source = Source(text_pipeline, Sampling(10, None, ("a cat", "a dog")), cache=tmp_path)
    data = source.record(every(4, (0, 4, 9)))
    states, errors = states_of(data, source), []
    where = data.take([state.records[0] for state in states])
    places = list(zip(where.trajectory.tolist(), where.step.tolist()))
    for learnt in ((), states):
        with (
            insert(
                Denoiser.of(text_pipeline), scheme("w4a8"), steps=StepTable.of(source.times(), 3)
            ) as network,
            Streams(network, data, tmp_path, batch=4) as streams,
        ):
            network.switch(weights=False, inputs=False)
            target = guided(network, data, places)
            with torch.no_grad():
                read, *_ = network_of(streams, states).outputs([torch.arange(len(states))])
            torch.testing.assert_close(read, target, rtol=1e-3, atol=1e-4)
            set_weight_ranges(network, partial(lp_search, candidates=8))
            set_input_ranges(network, data, partial(lp_search_binned, candidates=8))
            journal = Journal(tmp_path / f"{len(learnt)}", network, data, {})
            schedule = replace(QUICK, iterations=60, batch=8, weight_rate=0.05, scale_rate=5e-3, bf16=True)
            distil(streams, schedule, journal, stage="s", seed=0, progress=Silent(), states=learnt)
            errors.append(float((guided(network, data, places) - target).square().mean()))
    assert errors[1] < 0.9 * errors[0], errors
