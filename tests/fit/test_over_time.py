"""Scales as functions of t, against the best scale of each step by trial and against features written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import fake_quantize
from stepquant.core.grid import Grid
from stepquant.core.ranges import minmax
from stepquant.core.slices import Slices
from stepquant.core.steps import StepTable
from stepquant.errors import CalibrationError
from stepquant.fit.over_time import Seen, features, learn_scales, network_of, seen_by_step
from stepquant.fit.ranges import set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Silent
from stepquant.quant.insert import insert
from stepquant.quant.schemes import scheme

GRID = Grid.parse("int4/tensor")
STEPS = 12
TIMES = torch.linspace(990, 0, STEPS)
SPREADS = torch.linspace(1.0, 0.1, STEPS)  # of the activation at each of them


def activation(step: int) -> Tensor:
    return SPREADS[step] * torch.randn(2000, generator=Generator().manual_seed(step))


def seen(*steps: int) -> list[Seen]:
    return [Seen.of(Slices.of(activation(step)), step, "here") for step in steps]


def learnt(*steps: int, iterations: int = 120) -> Tensor:
    scales, zero_point = learn_scales(
        seen(*steps),
        GRID,
        features(TIMES),
        p=2.0,
        iterations=iterations,
        rate=0.003,
        generator=Generator().manual_seed(0),
    )
    assert zero_point == 0
    return scales


def error(step: int, scale: float) -> float:
    x = activation(step)
    return float((fake_quantize(x, torch.tensor(scale), torch.zeros(()), GRID) - x).square().mean())


def test_scales_come_near_the_best_of_each_step() -> None:
    scales, fixed = learnt(*range(STEPS)), learnt(*range(STEPS), iterations=0)
    assert torch.equal(fixed, fixed[:1].expand(STEPS)), "before anything is learnt, one scale for all t"
    tried = torch.logspace(-2.5, 0, 200).tolist()
    best = [min(error(step, scale) for scale in tried) for step in range(STEPS)]
    found = [error(step, float(scales[step])) for step in range(STEPS)]
    before = [error(step, float(fixed[step])) for step in range(STEPS)]
    assert sum(found) < 1.1 * sum(best)
    assert sum(before) > 1.5 * sum(best)


def test_the_first_scale_is_the_best_of_all_steps_together() -> None:
    fixed = float(learnt(*range(STEPS), iterations=0)[0])
    tried = torch.logspace(-2, 0, 400).tolist()
    best = min(sum(error(step, scale) for step in range(STEPS)) for scale in tried)
    assert sum(error(step, fixed) for step in range(STEPS)) < 1.05 * best


def test_a_step_without_records_has_about_what_its_neighbours_have() -> None:
    recorded = [step for step in range(STEPS) if step not in (4, 7)]
    scales, fixed = learnt(*recorded), learnt(*recorded, iterations=0)
    for step in (4, 7):
        between = float(scales[step - 1] * scales[step + 1]) ** 0.5
        assert abs(math.log(float(scales[step]) / between)) < 0.3
    assert abs(math.log(float(fixed[7]) / between)) > 0.6


def test_features_are_waves_of_geometric_lengths_for_times_of_any_size() -> None:
    found = features(TIMES)
    assert found.shape == (STEPS, 64)
    for step, part in ((3, 0), (5, 9), (11, 31)):
        angle = float(TIMES[step]) * 1000 / 990 / 10000 ** (part / 32)
        assert float(found[step, part]) == pytest.approx(math.sin(angle), abs=1e-4)
        assert float(found[step, 32 + part]) == pytest.approx(math.cos(angle), abs=1e-4)
    torch.testing.assert_close(features(TIMES / 1000), found, rtol=0, atol=1e-4)


def test_networks_are_drawn_from_their_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one, other = (network_of(Generator().manual_seed(3)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_histograms_hold_all_values_of_their_own_step(source: Source) -> None:
    denoiser = Denoiser.of(source.pipeline)
    data, steps = source.record(every(2, (0, 5, 9))), StepTable.of(source.times())
    with insert(denoiser, scheme("w8a8"), steps=steps) as network:
        set_weight_ranges(network, minmax)
        found = seen_by_step(network, data, steps, 1, Silent())
        assert set(found) == set(network.ranged())
    for calls in found.values():
        assert sorted(one.row for one in calls) == [0, 0, 5, 5, 9, 9]
        assert all(float(one.mass.sum()) == pytest.approx(1) for one in calls)


def test_constants_and_what_is_not_finite() -> None:
    one = Seen.of(Slices.of(torch.full((9,), 0.5)), 2, "here")
    assert (one.centres.tolist(), one.mass.tolist()) == ([0.5], [1.0])
    with pytest.raises(CalibrationError, match="not finite at 'here'"):
        Seen.of(Slices.of(torch.tensor([1.0, torch.inf])), 2, "here")
