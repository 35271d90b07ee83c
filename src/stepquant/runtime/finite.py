"""A warning of NaN and infinite numbers: quantizing turns them into codes of ordinary numbers, so nothing later shows them."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor


class NotFinite:
    """Warns, once for a model, of NaN and infinite numbers that reach it or leave it."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def warn(self, what: str, x: Tensor, t: object) -> None:
        """`what` is the input or the prediction; a sum tells most cheaply, but may overflow by itself."""
        if what in self.said or not x.is_cpu or not x.is_floating_point():
            return
        if math.isfinite(x.sum(dtype=torch.float32).item()):
            return
        finite = x.isfinite().flatten(1).all(1)
        if finite.all():
            return
        self.said.add(what)
        warnings.warn(
            f"the network's {what} at t = {time_of(t, int(finite.logical_not().nonzero()[0])):g} holds NaN or infinite "
            "values: codes cannot, so what is made of them looks like an image and is none; look for where they come from "
            "(the latents, the text, the sampler's numbers)",
            RuntimeWarning,
            stacklevel=3,
        )


def time_of(t: object, sample: int) -> float:
    times = torch.as_tensor(t).reshape(-1)
    return float(times[sample if sample < len(times) else 0])
