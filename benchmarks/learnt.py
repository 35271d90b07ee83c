"""Whether a model has learnt at all: how many of its weights still lie as their initialisation drew them.

Methods compared on a network that has not learnt say how they treat noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError

FLAT = 1.8  # kurtosis of a uniform distribution
WITHIN = 0.1  # of spread and kurtosis
FEWEST = 1024  # weights whose kurtosis says something
MOST = 0.5  # share of a model's weights that may lie as they were drawn


def check_learnt(model: nn.Module, name: str) -> None:
    """An error for a model most of whose weights have the spread and the kurtosis of their initialisation."""
    share = untouched(model)
    if share > MOST:
        raise StepquantError(
            f"'{name}' has hardly learnt: a comparison of methods on it says nothing about models that have",
            got=f"{share:.0%} of its weights with the spread and kurtosis of their initialisation",
            expected=f"at most {MOST:.0%}",
            fix="name a trained model with --model",
        )


def untouched(model: nn.Module) -> float:
    """Share of the weights in layers that lie as torch draws them."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    counted = [layer.weight.detach() for layer in layers if layer.weight.numel() >= FEWEST]
    total = sum(weight.numel() for weight in counted)
    return sum(weight.numel() for weight in counted if is_as_drawn(weight)) / max(total, 1)


def is_as_drawn(weight: Tensor) -> bool:
    """Uniform between -1 and 1 over the root of the inputs, as convolutions and linears of torch begin."""
    values = weight.double().flatten()
    spread = values.std()
    drawn = (3 * weight[0].numel()) ** -0.5
    kurtosis = ((values - values.mean()) / spread).pow(4).mean()
    return bool(
        torch.isclose(spread, spread.new_tensor(drawn), rtol=WITHIN) and abs(float(kurtosis) - FLAT) < WITHIN
    )
