"""A pipeline around any tiny model: states of its own noise at four times, with the arguments that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stepquant.calib.record import Source
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from tests.models.tiny import CASES

STEPS = 4
SAMPLING = Sampling(STEPS, prompts=(Call.of({}),))


class Steered:
    """What it returns is no picture of anything: calls of the denoiser are what it is for."""

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        self.denoiser, self.given = Denoiser(model), dict(given)
        self.components = {self.denoiser.component: model}
        self.scheduler = DDIMScheduler()
        setattr(self, self.denoiser.component, model)

    def set_progress_bar_config(self, **_: Any) -> None:
        return None

    def __call__(self, num_inference_steps: int = STEPS, generator: Any = None) -> SimpleNamespace:
        x, t = self.denoiser.family.x, self.denoiser.family.t
        state = self.given[x]
        for step in range(num_inference_steps):
            state = tree_map(lambda part: noisy(part, generator[0]), state)
            share = 1 - step / num_inference_steps
            time = (self.given[t] * share).to(self.given[t].dtype)
            self.denoiser.predict({**self.given, x: state, t: time})
        return SimpleNamespace(images=torch.zeros(1, 3, 2, 2))


def source_of(name: str, folder: Path) -> Source:
    """Records of the tiny model of that name."""
    torch.manual_seed(0)
    model, given, _ = CASES[name]()
    return Source(Steered(model, given), SAMPLING, batch=4, cache=folder)


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return 0.7 * x + 0.7 * torch.randn(x.shape, generator=generator)
