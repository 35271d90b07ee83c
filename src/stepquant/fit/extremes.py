"""Ranges of a part that knows no time: the least and the greatest that its calls showed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.artifact import Artifact
from stepquant.core.affine import scale_and_zero
from stepquant.core.ranges import minmax
from stepquant.core.slices import Slices
from stepquant.errors import CalibrationError
from stepquant.fit.ranges import counts_of, set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Progress, Silent
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from stepquant.quant.quantizer import Quantizer


@dataclass(eq=False)
class Extremes:
    """Widens the range of a quantizer with everything that it sees."""

    ends: dict[Quantizer, tuple[Tensor, Tensor]]

    def __call__(self, quantizer: Quantizer, values: Slices) -> None:
        low, high = values.ends
        if not (low.isfinite().all() and high.isfinite().all()):
            raise CalibrationError(
                f"activations are not finite at '{quantizer.site}'",
                fix="keep this layer, or the one before it, in float with a plan rule",
            )
        known = self.ends.get(quantizer, (low, high))
        self.ends[quantizer] = low, high = torch.minimum(known[0], low), torch.maximum(known[1], high)
        quantizer.set_range(*scale_and_zero(low, high, quantizer.grid))
        if quantizer.grid.codebook:  # for the last call, whose numbers lie as those before
            quantizer.set_codebook(counts_of(quantizer, values))


def fit_extremes(
    denoiser: Denoiser, plan: Plan, calls: Sequence[Any], progress: Progress | None = None
) -> Artifact:
    """Weights rounded to nearest, activations between the extremes of these calls (arguments by name)."""
    observe, what = Extremes({}), f"activation ranges of {denoiser.component}"
    with torch.no_grad(), insert(denoiser, plan) as network:
        set_weight_ranges(network, minmax, progress)
        observed = network.ranged()
        network.switch(weights=True, inputs=True)
        for quantizer in observed:
            quantizer.observer = observe
        needed = calls if observed else ()
        for arguments in (progress or Silent()).track(needed, what, len(needed)):
            denoiser.predict(arguments)
        for quantizer in observed:
            quantizer.observer = None
        return freeze(network)
