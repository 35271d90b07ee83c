"""How much predictions depend on layers, against derivatives by differences; bits against all ways to share them out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from torch import Generator, Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import fake_quantize, scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import lp_search_binned, minmax
from stepquant.core.steps import StepTable
from stepquant.fit import bits_by_step
from stepquant.fit.bits_by_step import Question, Reading, readings, share_out_bits, stepped
from stepquant.fit.fisher import information, relative
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent
from stepquant.quant.insert import Inserted, insert
from tests.conftest import without_ends

STEPS, HEAD, NARROW = 3, "proj_out_2", "transformer_blocks.1.ff.net.2"
QUESTION = Question((3, 8), lambda values, grid: minmax(values, grid), 2)


@pytest.fixture
def of_classes(class_pipeline: DiTPipeline, source: Source) -> Source:
    return replace(source, pipeline=class_pipeline, sampling=Sampling(STEPS), batch=2)


@contextmanager
def inserted(source: Source, plan: str = "w4a4") -> Iterator[tuple[Inserted, CalibSet, StepTable]]:
    data, table = source.record(every(1, range(STEPS))), StepTable.of(source.times())
    with insert(Denoiser.of(source.pipeline), without_ends(plan), steps=table) as network:
        yield network, data, table


def test_information_is_the_mean_square_of_derivatives(of_classes: Source) -> None:
    """Each output by itself moved up and down; the last layer's outputs are the prediction, whatever their order."""
    with inserted(of_classes) as (network, data, table):
        found = information(network, data, table, 2, Generator().manual_seed(7), Silent())
        assert set(found) == set(network.layers)
        state = Generator().manual_seed(7)
        rows = table.rows_of(torch.cat([one.arguments[data.t].reshape(-1) for one in data.batches(8)]))
        first = data.subset((rows == 0).nonzero().flatten().tolist())
        some = first.take(range(2))
        drawn = torch.randn(network.denoiser.predict(some.arguments).shape, generator=state)
        torch.testing.assert_close(float(found[HEAD][0]), drawn.double().square().mean().item())

        layer, squares, size = network.layers[NARROW], [], 0

        def moved(place: int, by: float) -> float:
            def hook(_: Any, __: Any, y: Tensor) -> Tensor:
                nonlocal size
                size = y.numel()
                flat = y.clone().flatten()
                flat[place] += by
                return flat.view_as(y)

            handle = layer.register_forward_hook(hook)
            with torch.no_grad():
                out = (network.denoiser.predict(some.arguments).double() * drawn).sum()
            handle.remove()
            return float(out)

        moved(0, 0.0)
        places = torch.randperm(size, generator=Generator().manual_seed(0))[:40].tolist()
        squares = [((moved(place, 0.05) - moved(place, -0.05)) / 0.1) ** 2 for place in places]
        mean = sum(squares) / len(squares)
        assert 0.6 < mean / float(found[NARROW][0]) < 1.6, "of some of the outputs"
        assert all(bool((value > 0).all()) for value in found.values())


def test_what_nothing_depends_on_has_no_step_before_another() -> None:
    assert relative(torch.zeros(3)).tolist() == [1, 1, 1]
    assert relative(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]


def test_errors_are_those_of_products_with_rounded_inputs(of_classes: Source) -> None:
    with inserted(of_classes) as (network, data, _):
        seen: list[Tensor] = []
        layer = network.layers[NARROW]
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        found = readings(network, stepped(network), data.take(range(2)).arguments, QUESTION)
        hook.remove()
        (x,) = seen
        for bits, error in zip((3, 8), found[NARROW].errors):
            grid = Grid(bits, signed=False, symmetric=False)
            scale, zero_point = scale_and_zero(x.min().reshape(1), x.max().reshape(1), grid)
            want = (
                F.linear(fake_quantize(x, scale, zero_point, grid) - x, layer.weight.detach()).square().mean()
            )
            assert error == pytest.approx(float(want), rel=1e-3)
        assert found[NARROW].macs == x.shape[0] * x.shape[1] * 128 * 32
        q, k, v, out = (
            found[f"transformer_blocks.0.attn1.{name}"].tensor
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        )
        assert q == k == v == out - 1, "three of them read one tensor"


def test_bits_are_shared_out_as_trying_all_ways_would(
    of_classes: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers read one tensor, and a third one another."""
    paths, widths = (NARROW, *(f"transformer_blocks.0.attn1.{name}" for name in ("to_k", "to_v"))), (3, 4, 8)
    told = dict(zip(paths, torch.tensor([[1.0, 5.0, 0.2], [3.0, 0.1, 1.0], [2.0, 0.2, 0.4]])))
    given = (0, [9.0, 3.0, 0.1], 100), (1, [2.0, 1.0, 0.05], 300), (1, [1.0, 0.8, 0.1], 300)
    errors = {path: Reading(*one) for path, one in zip(paths, given)}
    monkeypatch.setattr(bits_by_step, "readings", lambda *_: errors)
    with inserted(of_classes) as (network, data, table):
        layers = {path: network.layers[path] for path in paths}
        found = share_out_bits(network, layers, data, table, told, replace(QUESTION, widths=widths), Silent())
    places = [(path, row) for path in paths for row in range(STEPS)]

    def loss(bits: tuple[int, ...]) -> float:
        each = zip(places, bits)
        return sum(float(told[p][row]) * errors[p].errors[widths.index(b)] for (p, row), b in each)

    def cost(bits: tuple[int, ...]) -> int:
        return sum(errors[path].macs * b for (path, _), b in zip(places, bits))

    budget, ways = cost((4,) * len(places)), itertools.product(widths, repeat=2 * STEPS)
    both = ((*way, *way[STEPS:]) for way in ways)
    best = min((way for way in both if cost(way) <= budget), key=loss)
    mine = tuple(found[path][row] for path, row in places)
    assert mine[STEPS : 2 * STEPS] == mine[2 * STEPS :]
    assert cost(mine) <= budget
    assert loss(mine) == pytest.approx(loss(best))
    assert loss(best) < 0.9 * loss((4,) * len(places))


def test_eight_bits_everywhere_leave_nothing_to_share_out(of_classes: Source) -> None:
    with inserted(of_classes, "w4a8") as (network, _, __):
        assert stepped(network) == {}
    with inserted(of_classes, "w4a4") as (network, _, __):
        assert len(stepped(network)) > 10


def test_the_search_may_be_any(of_classes: Source) -> None:
    search = partial(lp_search_binned, p=2.0)
    with inserted(of_classes) as (network, data, _):
        found = readings(
            network, stepped(network), data.take([0]).arguments, replace(QUESTION, search=search)
        )
    assert all(one.errors[0] > one.errors[1] > 0 for one in found.values())
