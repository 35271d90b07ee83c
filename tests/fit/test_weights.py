"""Learnt sample weights against oracles: finite differences, autograd through the inner step, a corrupted sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from torch import Generator, Tensor

from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.errors import CalibrationError
from stepquant.fit.blocks import describe, hold_out, of_last_trajectories, reconstruct_blocks
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Schedule
from stepquant.fit.weights import (
    Weighing,
    inner_rate,
    learn_weights,
    misalignment,
    outer_loss,
    sample_gradients,
    score_gradient,
    step_groups,
    visiting,
    weigh_block,
)
from tests.conftest import make_one_level
from tests.fit.conftest import Bench

SETTINGS = Weighing(visits=12, batch=8, inner=0.05, groups=3, group_batch=4)


@pytest.fixture
def unet() -> UNet2DModel:
    return make_one_level()


class Toy:
    """Two layers in float64 whose target is another net of the same shape; records 20 and up are for validation."""

    def __init__(self) -> None:
        generator = Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.x = draw(44, 5)
        self.parameters = [draw(5, 6), draw(6, 4)]
        self.target = self.run([p + 0.5 * draw(p.shape) for p in self.parameters], self.x).detach()
        self.train = torch.arange(20)
        self.groups = [torch.arange(20, 28), torch.arange(28, 36), torch.arange(36, 44)]

    @staticmethod
    def run(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        first, second = parameters
        return torch.sigmoid(x @ first) @ second

    def losses(self, parameters: Sequence[Tensor], records: Tensor) -> Tensor:
        return (self.run(parameters, self.x[records]) - self.target[records]).square().sum(1)

    def moved(self, weights: Tensor, places: Tensor, settings: Weighing) -> list[Tensor]:
        """theta* of the inner step under these weights."""
        samples = sample_gradients(self.losses, self.parameters, self.train[places])
        rate = inner_rate(samples, settings.inner) * len(self.train) / len(places)
        return [
            p - rate * torch.einsum("i,i...->...", weights[places], g)
            for p, g in zip(self.parameters, samples)
        ]

    def objective(self, scores: Tensor, places: Tensor, settings: Weighing) -> Tensor:
        """L_VAL2 as a plain function of the scores, with the alignment by differentiating with respect to omega."""
        weights = torch.softmax(scores / settings.temperature, 0).requires_grad_()
        moved = self.moved(weights, places, settings)
        each = [self.losses(moved, group).mean() for group in self.groups]
        pulls = torch.stack([torch.autograd.grad(v, weights, retain_graph=True)[0][places] for v in each])
        loss = torch.stack(each).mean().detach()
        if settings.cosine:
            pulls = pulls / pulls.norm(dim=1, keepdim=True)
            return loss / self.scale + settings.alignment * misalignment(pulls)
        return loss + settings.alignment * misalignment(pulls)

    scale = torch.ones(())


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("alignment", [0.0, 1.0])
def test_score_gradient_agrees_with_finite_differences(cosine: bool, alignment: float) -> None:
    toy, places = Toy(), torch.tensor([0, 2, 3, 7, 8, 11, 15, 19])
    settings = replace(SETTINGS, cosine=cosine, alignment=alignment, temperature=0.7)
    scores = 0.3 * torch.randn(20, generator=Generator().manual_seed(5), dtype=torch.float64)
    found = score_gradient(toy.losses, toy.parameters, scores, toy.train, places, toy.groups, settings)

    moved = toy.moved(torch.softmax(scores / 0.7, 0), places, settings)
    each = torch.stack([toy.losses(moved, group).mean() for group in toy.groups])
    if cosine and alignment:
        toy.scale = each.mean().detach()
    if not alignment:
        settings = replace(settings, cosine=False)
    step, expected = 1e-5, torch.zeros(20, dtype=torch.float64)
    for i in range(20):
        shift = torch.zeros(20, dtype=torch.float64)
        shift[i] = step
        above = toy.objective((scores + shift).detach(), places, settings)
        below = toy.objective((scores - shift).detach(), places, settings)
        expected[i] = (above - below) / (2 * step)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_detached_group_gradients_leave_the_alignment_without_a_gradient() -> None:
    """v_t is what the alignment depends on the weights through."""
    toy, places = Toy(), torch.arange(8)
    samples = sample_gradients(toy.losses, toy.parameters, places)
    moved = [p.detach().requires_grad_() for p in toy.parameters]

    def gradient(alignment: float, losses: object) -> list[Tensor]:
        settings = replace(SETTINGS, alignment=alignment, cosine=False)
        total = outer_loss(losses, moved, samples, toy.groups, 0.1, settings)
        return list(torch.autograd.grad(total, moved))

    aligned, plain = gradient(1.0, toy.losses), gradient(0.0, toy.losses)
    assert max((a - b).abs().max() for a, b in zip(aligned, plain)) > 1e-6

    def linear(parameters: Sequence[Tensor], records: Tensor) -> Tensor:
        """The same gradients v_t, but constants: what a detach would make of them."""
        at = [p.detach().requires_grad_() for p in parameters]
        slopes = torch.autograd.grad(toy.losses(at, records).mean(), at)
        return sum((p * s).sum() for p, s in zip(parameters, slopes)).expand(len(records))

    aligned, plain = gradient(1.0, linear), gradient(0.0, linear)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(aligned, plain))


@pytest.mark.parametrize("cosine", [False, True])
def test_weights_are_never_negative_and_sum_to_one(cosine: bool) -> None:
    toy = Toy()
    settings = replace(SETTINGS, cosine=cosine, rate=1.0)
    found = learn_weights(
        toy.losses, toy.parameters, toy.train, toy.groups, settings, Generator().manual_seed(0)
    )
    assert (found >= 0).all()
    assert float(found.sum()) == pytest.approx(1)
    assert found.std() > 0


def test_a_corrupted_sample_falls_below_average() -> None:
    toy = Toy()
    toy.target[4] = 5 * torch.randn(4, generator=Generator().manual_seed(9), dtype=torch.float64)
    found = learn_weights(
        toy.losses, toy.parameters, toy.train, toy.groups, SETTINGS, Generator().manual_seed(0)
    )
    assert found[4] < 1 / 20


def test_groups_agree_no_less_after_the_weights_are_learnt() -> None:
    toy, places = Toy(), torch.arange(20)
    settings = replace(SETTINGS, batch=20, group_batch=8)

    def agreement(weights: Tensor) -> float:
        moved = [p.detach().requires_grad_() for p in toy.moved(weights, places, settings)]
        slopes = [torch.autograd.grad(toy.losses(moved, group).mean(), moved) for group in toy.groups]
        flat = torch.stack([torch.cat([part.flatten() for part in slope]) for slope in slopes])
        cosines = torch.nn.functional.normalize(flat, dim=1)
        return float((cosines @ cosines.T)[~torch.eye(3, dtype=torch.bool)].mean())

    even = torch.full((20,), 1 / 20, dtype=torch.float64)
    found = learn_weights(
        toy.losses, toy.parameters, toy.train, toy.groups, settings, Generator().manual_seed(0)
    )
    assert agreement(found) >= agreement(even)


@pytest.mark.parametrize("batch", [6, 20, 64])
def test_every_record_is_visited_as_often(batch: int) -> None:
    settings = replace(SETTINGS, visits=3, batch=batch)
    places = list(visiting(20, settings, Generator().manual_seed(0)))
    assert torch.cat(places).bincount().tolist() == [3] * 20
    assert all(len(some) == len(some.unique()) <= batch for some in places)


def test_misalignment_is_the_double_sum() -> None:
    pulls = torch.randn(4, 6, generator=Generator().manual_seed(0))
    double = sum(pulls[t] @ pulls[k] for t in range(4) for k in range(4) if t != k)
    torch.testing.assert_close(misalignment(pulls), -2 / (4 * 3) * double)


def test_groups_are_contiguous_steps() -> None:
    steps = torch.tensor([0, 9, 1, 8, 2, 7, 3, 6, 4, 5])
    groups = step_groups(steps, torch.arange(10), 5)
    assert [steps[group].sort().values.tolist() for group in groups] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [8, 9],
    ]
    uneven = step_groups(torch.tensor([0, 1, 2, 50, 90, 99, 99]), torch.arange(7), 3)
    assert [group.tolist() for group in uneven] == [[0, 1], [2, 3], [4, 5, 6]], "by place, not by distance"
    with pytest.raises(CalibrationError, match="5 groups of steps cannot be compared"):
        step_groups(steps, torch.tensor([3, 3, 0]), 5)


def test_validation_records_are_as_many_of_every_step(source: Source) -> None:
    data = source.record(every(10, (0, 4, 9)))
    held = of_last_trajectories(data, 0.2)
    assert data.steps()[held].bincount().tolist() == [2, 0, 0, 0, 2, 0, 0, 0, 0, 2]
    train, kept = hold_out(len(data), held)
    assert sorted([*train.tolist(), *kept.tolist()]) == list(range(30))
    assert not set(data.trajectories()[train].tolist()) & set(data.trajectories()[kept].tolist())


@pytest.mark.parametrize(
    ("bench", "path", "first"),
    [
        ("w4a8", "down_blocks.0.resnets.0", "conv1"),
        ("w4a16", "mid_block.attentions.0", "to_q"),  # torch's own product, differentiated twice
    ],
    indirect=["bench"],
)
def test_a_block_gets_weights_with_mean_one(bench: Bench, path: str, first: str) -> None:
    steps = bench.data.steps()
    settings = Weighing(visits=1, batch=8, groups=3)
    piece, sample = next((p, s) for p, s in bench.samples() if p.path == path)
    bench.network.switch(weights=True, inputs=False)
    found = weigh_block(bench.network, piece, sample, 0, steps=steps, settings=settings)
    assert float(found[sample.train].mean()) == pytest.approx(1, abs=1e-5)
    assert found[sample.train].std() > 0
    assert bench.network.layers[f"{path}.{first}"].rounding is None


def test_without_meta_steps_the_result_is_that_of_no_weights_bit_for_bit(bench: Bench, tmp_path) -> None:  # type: ignore[no-untyped-def]
    weigh = partial(weigh_block, steps=bench.data.steps(), settings=Weighing(visits=0))
    schedule = Schedule(iterations=5, batch=8, rounding_rate=0.1)
    found = []
    for name, chosen in (("plain", None), ("zero", weigh)):
        journal = Journal(tmp_path / name, bench.network, bench.data, {})
        reports = reconstruct_blocks(
            bench.streams, schedule, journal, stage="w", activations=False, held=0.25, weigh=chosen
        )
        found.append((reports, [layer.weight_integers() for layer in bench.network.layers.values()]))
        for layer in bench.network.layers.values():
            layer.rounding = None
    for plain, zero in zip(*(reports for reports, _ in found)):
        assert replace(zero, weights=()) == plain
        assert zero.weights == [1.0, 1.0]
        assert "weights 1.00 to 1.00" in describe(zero)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))
