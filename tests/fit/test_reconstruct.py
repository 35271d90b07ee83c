from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Generator

from stepquant.core.losses import BlockLoss, Outputs
from stepquant.core.ranges import minmax
from stepquant.errors import MethodError
from stepquant.fit.blocks import hold_out, share_iterations, without_gradients
from stepquant.fit.checkpoint import Batches
from stepquant.fit.learnable import FixedRounding, LearnedScale, SoftRounding
from stepquant.fit.learner import Learner, Sample, Schedule, inside
from stepquant.fit.ranges import set_input_ranges
from stepquant.fit.reconstruct import cosine, reconstruct
from stepquant.fit.streams import Table
from tests.fit.conftest import Bench

QUICK = Schedule(iterations=40, batch=12, rounding_rate=0.1, penalty=0.1)


def find(bench: Bench, path: str) -> tuple[object, Sample]:
    return next((piece, sample) for piece, sample in bench.samples() if piece.path == path)


def test_every_block_ends_below_rounding_to_nearest(bench: Bench) -> None:
    blocks = bench.network.denoiser.blocks()
    with without_gradients(bench.network):
        for piece, sample in bench.samples():
            if piece.path not in blocks:
                continue
            report = reconstruct(bench.network, piece, sample, QUICK, seed=0)
            assert report.hard < report.nearest, piece.path
            assert report.gap == report.hard - report.soft
            for layer in inside(bench.network.layers, piece.path).values():
                assert isinstance(layer.rounding, FixedRounding)
                layer.rounding = None


def test_a_block_whose_roundings_are_decided_is_done(bench: Bench) -> None:
    piece, sample = find(bench, "down_blocks.0.resnets.0")
    bench.network.switch(weights=True, inputs=False)
    schedule = replace(QUICK, iterations=120, penalty=10.0, last=0.3)
    counted, done = (
        reconstruct(bench.network, piece, sample, replace(schedule, gap=gap), seed=0) for gap in (0.0, 0.3)
    )
    assert counted.iterations == 120, "without a gap, the count alone decides"
    assert done.iterations < 120
    assert abs(done.gap) < 0.3 * done.hard
    assert done.hard < 1.1 * counted.hard


def test_small_blocks_have_more_iterations_and_large_ones_pay() -> None:
    sizes = {"small": 100, "middle": 10_000, "large": 1_000_000, "none": 0}
    even = share_iterations(sizes, Schedule(iterations=300))
    assert set(even.values()) == {300}
    shares = share_iterations(sizes, Schedule(iterations=300, by_size=0.25))
    assert shares["small"] == shares["none"] == 900
    assert 600 < shares["middle"] < 700
    assert shares["large"] == 240
    cost = sum(shares[path] * size for path, size in sizes.items())
    assert cost < 300 * sum(sizes.values()), "all together take no longer"
    assert set(share_iterations(sizes, Schedule(iterations=0, by_size=0.25)).values()) == {0}


def test_the_reported_loss_is_that_of_the_integers(bench: Bench) -> None:
    piece, sample = find(bench, "down_blocks.0.resnets.0")
    bench.network.switch(weights=True, inputs=False)
    report = reconstruct(bench.network, piece, sample, QUICK, seed=0)
    with torch.no_grad():
        out = Outputs(piece.outputs(sample.quants.take(sample.held)))
    assert float(BlockLoss()(out, Outputs(sample.targets.take(sample.held)))) == pytest.approx(
        report.hard, rel=1e-5
    )


def test_tables_on_disk_are_read_ahead_and_change_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, sample = find(bench, "mid_block.resnets.0")
    bench.network.switch(weights=True, inputs=False)
    mapped = replace(sample, quants=replace(sample.quants, mapped=True))
    touched: list[torch.Tensor] = []
    monkeypatch.setattr(Table, "touch", lambda self, rows: touched.append(rows))
    found = []
    for each in (sample, mapped):
        reports = reconstruct(bench.network, piece, each, QUICK, seed=0)
        layers = inside(bench.network.layers, piece.path).values()
        found.append((reports, [layer.weight_integers() for layer in layers]))
        for layer in layers:
            layer.rounding = None
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))
    assert touched
    assert {int(row) for rows in touched for row in rows} <= set(sample.train.tolist())


def test_the_same_seed_gives_the_same_bytes(bench: Bench) -> None:
    piece, sample = find(bench, "mid_block.resnets.0")
    bench.network.switch(weights=True, inputs=False)
    layer = bench.network.layers["mid_block.resnets.0.conv1"]
    found = []
    for seed in (0, 0, 1):
        reconstruct(bench.network, piece, sample, QUICK, seed)
        found.append(layer.weight_integers())
        for each in inside(bench.network.layers, piece.path).values():
            each.rounding = None
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_does_not_help_is_not_kept(bench: Bench) -> None:
    piece, sample = find(bench, "down_blocks.0.resnets.0")
    bench.network.switch(weights=True, inputs=False)
    wrong = tuple(torch.randn_like(column) for column in sample.targets.columns)
    targets = replace(sample.targets, columns=wrong)
    report = reconstruct(
        bench.network, piece, replace(sample, targets=targets), replace(QUICK, iterations=1), 0
    )
    assert report.hard <= report.nearest
    if report.hard == report.nearest:
        assert all(layer.rounding is None for layer in inside(bench.network.layers, piece.path).values())


def test_a_loss_that_is_not_finite_names_the_block(bench: Bench) -> None:
    piece, sample = find(bench, "down_blocks.0.resnets.0")
    bench.network.switch(weights=True, inputs=False)
    broken = replace(sample.targets, columns=tuple(c * torch.nan for c in sample.targets.columns))
    with pytest.raises(MethodError, match=r"down_blocks\.0\.resnets\.0.*not finite"):
        reconstruct(bench.network, piece, replace(sample, targets=broken), QUICK, 0)
    assert all(layer.rounding is None for layer in inside(bench.network.layers, piece.path).values())


def test_activation_steps_are_learnt_with_their_zero_points_fixed(bench: Bench) -> None:
    set_input_ranges(bench.network, bench.data, minmax)
    piece, sample = find(bench, "up_blocks.1.resnets.0")
    bench.network.switch(weights=True, inputs=True)
    quantizer = bench.network.layers["up_blocks.1.resnets.0.conv1"].input_quantizer
    wide, zero_point = (value.clone() for value in quantizer.range())
    quantizer.set_range(wide * 8, zero_point)
    schedule = Schedule(iterations=40, batch=12, rounding_rate=0, scale_rate=0.1)
    report = reconstruct(bench.network, piece, sample, schedule, 0)
    scale, after = quantizer.range()
    assert report.hard < report.nearest
    assert scale < wide * 8
    assert torch.equal(zero_point, after)
    assert quantizer.stand_in is None
    assert bench.network.layers["up_blocks.1.resnets.0.conv1"].rounding is None


def test_layers_count_in_the_loss_unless_gamma_is_zero(bench: Bench) -> None:
    piece, sample = find(bench, "up_blocks.1.resnets.0")
    bench.network.switch(weights=True, inputs=False)
    values = {}
    for gamma in (0.0, 0.8):
        schedule = replace(QUICK, loss=BlockLoss(layers=gamma))
        learner = Learner(bench.network, piece, schedule, Generator().manual_seed(0))
        with torch.no_grad():
            values[gamma] = float(learner.loss(sample, sample.held)), float(learner.held_loss(sample))
        assert len(learner.watched) == (
            3 if gamma else 0
        )  # conv1, time_emb_proj, conv2; the shortcut is the last
    assert values[0.0][0] == pytest.approx(values[0.0][1], rel=1e-5)
    assert values[0.8][0] > values[0.8][1] == values[0.0][1]


def test_inputs_are_mixed_element_by_element(bench: Bench) -> None:
    piece, sample = find(bench, "mid_block.resnets.0")
    learner = Learner(bench.network, piece, replace(QUICK, mix=0.5), Generator().manual_seed(0))
    rows = sample.train[:4]
    mixed, quant, plain = learner.mixed(sample, rows), sample.quants.take(rows), sample.floats.take(rows)
    from_quant, from_plain = mixed[0] == quant[0], mixed[0] == plain[0]
    assert (from_quant | from_plain).all()
    assert 0.4 < from_quant.float().mean() < 0.6
    assert torch.equal(mixed[1], quant[1]), "the time embedding is the quantized one"


def test_batches_use_every_record_equally_often() -> None:
    records = torch.arange(10, 17)
    schedule = Schedule(iterations=14, batch=3)
    pairs = list(islice(Batches(records, schedule, Generator().manual_seed(0)), schedule.iterations))
    drawn = [rows for rows, _ in pairs]
    for (_, coming), rows in zip(pairs, drawn[1:]):
        assert torch.equal(coming, rows[: len(coming)])  # known early, or not yet drawn
    assert all(len(rows) == 3 for rows in drawn)
    assert torch.cat(drawn).bincount()[10:].tolist() == [6] * 7


def test_rates_fall_along_half_a_cosine() -> None:
    assert [cosine(p, 0.0) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [cosine(p, 0.2) for p in (0, 0.5, 1)] == pytest.approx([1, 0.6, 0.2])


def test_held_out_records_are_apart() -> None:
    train, held = hold_out(20, 0.25)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(20))
    assert len(held) == 5


def test_soft_rounding_starts_at_the_float_weight_and_hardens_to_integers(bench: Bench) -> None:
    layer = bench.network.layers["conv_in"]
    soft = SoftRounding(layer.weight, layer.weight_quantizer)
    scale, _ = layer.weight_quantizer.range()
    inside_grid = (soft.span > 0).reshape(layer.weight.shape)
    assert inside_grid.float().mean() > 0.9
    error = (soft.values(layer.weight, layer.weight_quantizer) - layer.weight).abs()
    assert (error[inside_grid] < 1e-4 * scale.max()).all()
    soft.hard = True
    bench.network.switch(weights=True, inputs=False)
    nearest = layer.weight_values()
    assert torch.equal(soft.values(layer.weight, layer.weight_quantizer), nearest)


def test_dropped_activations_are_the_unquantized_ones(bench: Bench) -> None:
    set_input_ranges(bench.network, bench.data, minmax)
    quantizer = bench.network.layers["conv_out"].input_quantizer
    x = torch.randn(4, 3, 8, 8, generator=Generator().manual_seed(1))
    step = LearnedScale(quantizer, keep=0.5, generator=Generator().manual_seed(0))
    quantized = quantizer(x)
    mixed = step(quantizer, x)
    kept = (mixed == x).float().mean()
    assert 0.3 < kept < 0.7
    torch.testing.assert_close(torch.where(mixed == x, quantized, mixed), quantized, rtol=0, atol=1e-5)
    step.training = False
    torch.testing.assert_close(step(quantizer, x), quantized, rtol=0, atol=1e-5)
