"""Learn one weight per calibration sample, so that steps of the sampler that pull against each other can be fitted together.

Two levels: a step of the block's roundings under the weights (inner), and what that step does to validation records of
several groups of steps (outer). All gradients with respect to the weights follow from two kinds of vectors: g_i, the
gradient of training sample i, and v_t, the gradient of group t after the inner step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepquant.core.affine import to_groups
from stepquant.core.losses import BlockLoss
from stepquant.errors import CalibrationError, MethodError
from stepquant.fit.learner import Learner, Sample, Schedule
from stepquant.fit.streams import Piece
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer, from_integers
from stepquant.quant.quantizer import Quantizer

Losses = Callable[[Sequence[Tensor], Tensor], Tensor]  # parameters, record numbers -> one loss per record


@dataclass(frozen=True)
class Weighing:
    """How sample weights are learnt."""

    visits: int = 3  # how often every record is in a batch
    batch: int = 32
    rate: float = 0.1  # change of a visited score per visit, for a gradient of ordinary size
    inner: float = 0.1  # root mean square change of the parameters (in steps of the grid) in the inner step
    temperature: float = 1.0
    alignment: float = 1.0  # weight of the alignment between groups beside their losses
    cosine: bool = True  # measure alignment by angle instead of by raw inner product
    groups: int = 5
    group_batch: int = 8
    without: tuple[str, ...] = ()  # roles whose layers stay as they are


def learn_weights(
    losses: Losses,
    parameters: Sequence[Tensor],
    train: Tensor,
    groups: Sequence[Tensor],
    settings: Weighing,
    generator: Generator,
) -> Tensor:
    """Weights of the records in `train`: never negative, with sum 1."""
    scores = torch.full((len(train),), 1 / 32, dtype=parameters[0].dtype, device=parameters[0].device)
    for places in visiting(len(train), settings, generator):
        chosen = [
            group[torch.randperm(len(group), generator=generator)[: settings.group_batch]] for group in groups
        ]
        slope = score_gradient(losses, parameters, scores, train, places, chosen, settings)
        size = slope[places].square().mean().sqrt()
        if size > 0:
            scores = scores - settings.rate * slope / size
    return torch.softmax(scores / settings.temperature, 0)


def visiting(records: int, settings: Weighing, generator: Generator) -> Iterator[Tensor]:
    """Batches of all records, in another order at every visit."""
    for _ in range(settings.visits):
        yield from torch.randperm(records, generator=generator).split(settings.batch)


def score_gradient(
    losses: Losses,
    parameters: Sequence[Tensor],
    scores: Tensor,
    train: Tensor,
    places: Tensor,
    groups: Sequence[Tensor],
    settings: Weighing,
) -> Tensor:
    """dL/ds: how the validation loss after the inner step changes with the score of every training record."""
    weights = torch.softmax(scores / settings.temperature, 0)
    share = len(train) / len(places)  # the batch stands for all records
    samples = sample_gradients(losses, parameters, train[places])
    rate = inner_rate(samples, settings.inner)
    moved = [
        p - rate * share * (weights[places] @ g.flatten(1)).view_as(p) for p, g in zip(parameters, samples)
    ]

    # Outer: the gradient with respect to a weight is -rate * share * <g_i, dL/dtheta*>.
    moved = [p.detach().requires_grad_() for p in moved]
    total = outer_loss(losses, moved, samples, groups, rate * share, settings)
    outer = torch.autograd.grad(total, moved)
    slope = torch.zeros_like(weights)
    slope[places] = -rate * share * project(samples, outer)
    return weights * (slope - (weights * slope).sum()) / settings.temperature


def inner_rate(samples: Sequence[Tensor], size: float) -> float:
    """The rate at which an evenly weighted inner step changes the parameters by `size` (root mean square)."""
    means = torch.cat([gradient.mean(0).flatten() for gradient in samples])
    return size / float(means.square().mean().sqrt().clamp(min=1e-30))


def sample_gradients(losses: Losses, parameters: Sequence[Tensor], records: Tensor) -> list[Tensor]:
    """g_i: for every parameter, the gradient of each record's loss, records first."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    rows = [torch.autograd.grad(losses(leaves, record).sum(), leaves) for record in records.split(1)]
    return [torch.stack(column) for column in zip(*rows)]


def project(samples: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """<g_i, v> for every sample i."""
    return sum((g.flatten(1) @ v.flatten() for g, v in zip(samples, vectors)), torch.zeros(()))  # type: ignore[return-value]


def outer_loss(
    losses: Losses,
    moved: Sequence[Tensor],
    samples: Sequence[Tensor],
    groups: Sequence[Tensor],
    rate: float,
    settings: Weighing,
) -> Tensor:
    """Validation loss of all groups plus their misalignment, measured in the space of sample weights."""
    # For attention products that stay in float: torch differentiates no other of its kernels twice.
    with sdpa_kernel(SDPBackend.MATH):
        each = [losses(moved, group).mean() for group in groups]
    loss = torch.stack(each).mean()
    if not settings.alignment or len(groups) < 2:
        return loss
    slopes = [torch.autograd.grad(value, moved, create_graph=True) for value in each]
    pulls = torch.stack([-rate * project(samples, slope) for slope in slopes])
    if not settings.cosine:
        return loss + settings.alignment * misalignment(pulls)
    # The scale of the losses must not decide between the two terms.
    pulls = pulls / pulls.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return loss / loss.detach().clamp(min=1e-30) + settings.alignment * misalignment(pulls)


def misalignment(pulls: Tensor) -> Tensor:
    """-2 / (T (T - 1)) times the sum of <pull_t, pull_k> over t != k, for rows t of `pulls`."""
    count = len(pulls)
    crossed = pulls.sum(0).square().sum() - pulls.square().sum()
    return -2 / (count * (count - 1)) * crossed


def step_groups(steps: Tensor, records: Tensor, count: int) -> list[Tensor]:
    """The records in `count` groups of neighbouring steps, each with as many of the steps that were recorded."""
    recorded, place = steps[records].unique(return_inverse=True)
    if len(recorded) < count:
        raise CalibrationError(
            f"{count} groups of steps cannot be compared",
            got=f"validation records of {len(recorded)} steps",
            fix="--set groups=N for fewer groups, or calibrate over more --steps",
        )
    group = place * count // len(recorded)
    return [records[group == number] for number in range(count)]


class Displaced:
    """Weights rounded to nearest and moved from there by `displacement`, in gaps of their grid."""

    def __init__(self, layer: QuantLayer, quantizer: Quantizer) -> None:
        self.nearest = to_groups(from_integers(layer.weight_integers(), quantizer), quantizer.grid)
        self.gaps = quantizer.levels.gaps()
        self.displacement = torch.zeros_like(self.nearest)

    def values(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        return torch.addcmul(self.nearest, self.displacement, self.gaps).reshape(weight.shape)

    def integers(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        raise MethodError("displaced weights are for gradients: they are on no grid and cannot be packed")


def weigh_block(
    network: Inserted, piece: Piece, sample: Sample, seed: int, *, steps: Tensor, settings: Weighing
) -> Tensor:
    """One weight per record, mean 1 over the training records, learnt on this block's roundings."""
    weights = torch.ones(len(steps))
    generator = Generator().manual_seed(seed)
    schedule = Schedule(iterations=0, rounding_rate=0, without=settings.without)
    learner = Learner(network, piece, schedule, generator)
    layers = [layer for layer in learner.layers.values() if layer.weight_quantizer is not None]
    if not settings.visits or not layers:
        return weights
    groups = step_groups(steps, sample.held, settings.groups)
    places = [Displaced(layer, layer.weight_quantizer) for layer in layers]  # type: ignore[arg-type]
    measure = BlockLoss()

    def losses(displacements: Sequence[Tensor], records: Tensor) -> Tensor:
        for place, displacement in zip(places, displacements, strict=True):
            place.displacement = displacement
        return measure.each(learner.outputs(sample.quants.take(records)), learner.target(sample, records))

    try:
        for layer, place in zip(layers, places):
            layer.rounding = place
        start = [place.displacement for place in places]
        learnt = learn_weights(losses, start, sample.train, groups, settings, generator)
    finally:
        for layer in layers:
            layer.rounding = None
    weights[sample.train] = learnt.cpu() * len(sample.train)
    return weights
