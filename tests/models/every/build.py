"""What every tiny builder is made of: noise, times, places, and parameters that are not zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, dict[str, Any]]
TEXT = 7


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def times(most: int = 1000) -> Tensor:
    """A time for each of the two images: of 1000 steps, or of the unit interval."""
    return torch.tensor([300, 700]) if most > 1 else torch.tensor([0.3, 0.7])


def text(width: int, tokens: int = TEXT) -> dict[str, Tensor]:
    return {"encoder_hidden_states": noise(2, tokens, width)}


def masked_text(width: int, tokens: int = TEXT, kind: torch.dtype = torch.bool) -> dict[str, Tensor]:
    """Text whose second prompt is two tokens shorter."""
    mask = torch.ones(2, tokens, dtype=kind)
    mask[1, -2:] = 0
    return {"encoder_hidden_states": noise(2, tokens, width), "encoder_attention_mask": mask}


def places(height: int, width: int) -> Tensor:
    """The row and the column of each token of an image, after a zero for its frame."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))


def alive(model: nn.Module) -> nn.Module:
    """Small random values for what starts at zero: a zero gate hides all that it closes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


def seeded(build: Callable[[], Case]) -> Callable[[], Case]:
    """The same model and inputs on every call, whatever was drawn before it."""

    @wraps(build)
    def built() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = build()
            return alive(model), inputs

    return built
