"""Means of what noise leaves open, against sums over every picture that is open."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepquant.evaluate.metrics.parts import Kind, Parts
from tests.examples.test_trainers import EXAMPLES, scripts

__all__ = ["scripts"]
COUNTS, SIZE = (2, 3, 4, 2, 3), (5, 4)
OPEN = ((1, 2), (3, 4))


@pytest.fixture(scope="module")
def compositions(scripts: Iterator[None]) -> Any:
    torch.manual_seed(0)
    kinds = []
    for level, count in enumerate(COUNTS):
        pixels = torch.randint(0, 256, (count, *SIZE, 4), dtype=torch.uint8)
        pixels[..., 3] = 255 if level == 0 else torch.randint(0, 2, (count, *SIZE), dtype=torch.uint8) * 255
        kinds.append(Kind.of(str(level), pixels))
    return importlib.import_module("posterior").Compositions(Parts(tuple(kinds), SIZE, "none"))


def open_to(compositions: Any, noisy: Tensor, signal: Tensor, sigma: Tensor, picked: Tensor) -> Tensor:
    """By trying every part of two kinds, one picture after the other."""
    known = compositions.compose(picked).double()
    out = known.clone()
    for row, (low, high) in itertools.product(range(len(picked)), OPEN):
        tried = [
            torch.where(torch.arange(len(COUNTS)) == low, a, picked[row]).index_fill(0, torch.tensor(high), b)
            for a, b in itertools.product(range(COUNTS[low]), range(COUNTS[high]))
        ]
        pictures = compositions.compose(torch.stack(tried)).double()
        errors = (noisy[row].flatten(1).double() - signal[row] * pictures).square().sum((1, 2))
        chance = (-errors / (2 * sigma[row].double() ** 2)).softmax(0)
        out[row] += (chance[:, None, None] * pictures).sum(0) - known[row]
    return out.unflatten(2, SIZE)


def test_means_are_sums_over_all_that_is_open(compositions: Any) -> None:
    picked = torch.stack([torch.randint(count, (8,)) for count in COUNTS], 1)
    signal = torch.linspace(0.05, 0.99, 8)
    sigma = (1 - signal.square()).sqrt()
    clean = compositions.compose(picked).unflatten(2, SIZE)
    noisy = signal.view(-1, 1, 1, 1) * clean + sigma.view(-1, 1, 1, 1) * torch.randn(clean.shape)
    found = compositions.mean(noisy, signal, sigma, picked)
    want = open_to(compositions, noisy, signal, sigma, picked)
    assert (found - want).abs().max() < 1e-4
    assert (found - clean).abs().max() > 0.1, "something is open"


def test_the_loss_has_the_gradient_of_the_plain_one_in_the_mean(compositions: Any) -> None:
    """Over many draws of the noise; its own value is smaller by what no network can know."""
    training, count = importlib.import_module("training"), 20_000
    picked = torch.stack([torch.randint(n, (count,)) for n in COUNTS], 1)
    clean = compositions.compose(picked).unflatten(2, SIZE)
    guess = torch.zeros(1, requires_grad=True)
    losses = []
    for mean in (None, lambda *noisy: compositions.mean(*noisy, picked)):
        torch.manual_seed(1)
        loss = training.Loss()(lambda noisy, steps: guess * noisy, clean, mean)
        (slope,) = torch.autograd.grad(loss, guess)
        losses.append((float(loss.detach()), float(slope)))
    (plain, slope), (averaged, other) = losses
    assert averaged < 0.95 * plain
    assert abs(other - slope) < 0.03 * abs(slope)


def test_images_of_other_parts_are_refused(compositions: Any, tmp_path: Path) -> None:
    module = importlib.import_module("posterior")
    noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(module.DataError, match="composed of no such parts"):
        module.parts_of(noise, "characters", tmp_path)
    assert str(EXAMPLES) in sys.path
    with pytest.raises(module.DataError, match="another size"):
        module.parts_of(noise[..., :16], "characters", tmp_path)
