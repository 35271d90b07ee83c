"""Which activations change so much from step to step that one range would not serve all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from stepquant.calib.calibset import CalibSet
from stepquant.core.slices import Slices
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import Place, insert
from stepquant.quant.plan import Plan
from stepquant.quant.quantizer import Quantizer

SMALL = 1 / 8  # three bits of a range over all steps are not used at that step
RECORDS = 2  # of every step


def uneven(
    denoiser: Denoiser, plan: Plan, data: CalibSet, *, split: bool = False, small: float = SMALL
) -> dict[Place, float]:
    """The activations whose range at some step is a small part of their range over all, and how small a part.

    Seen in float, so that no range has to be known. Probabilities sum to 1 at every step, and do not count.
    """
    spans: dict[Place, dict[int, float]] = {}
    with torch.no_grad(), insert(denoiser, plan, split=split) as network:
        network.switch(weights=False, inputs=False)
        quantizers = [q for q in network.ranged() if q.site.port != "probabilities"]
        for step, records in few_of_each(data).items():
            for quantizer in quantizers:
                quantizer.observer = widest_at(step, spans)
            if quantizers:
                denoiser.predict(data.take(records).arguments)
    parts = {place: min(found.values()) / (max(found.values()) or 1.0) for place, found in spans.items()}
    return {place: part for place, part in parts.items() if part < small}


def few_of_each(data: CalibSet) -> dict[int, list[int]]:
    """Some records of every step that was recorded."""
    chosen: dict[int, list[int]] = {}
    for record, step in enumerate(data.steps().tolist()):
        if len(chosen.setdefault(step, [])) < RECORDS:
            chosen[step].append(record)
    return chosen


def widest_at(step: int, spans: dict[Place, dict[int, float]]) -> Callable[[Quantizer, Slices], None]:
    """Notes how far zero and all values that a quantizer sees lie apart."""

    def observe(quantizer: Quantizer, values: Slices) -> None:
        low, high = (end.item() for end in values.ends)
        found = spans.setdefault((quantizer.site.path, quantizer.site.port), {})
        found[step] = max(found.get(step, 0.0), max(high, 0.0) - min(low, 0.0))

    return observe


def described(found: Mapping[Place, float]) -> str:
    """What was found, for whoever reads along."""
    path, port = least = min(found, key=found.__getitem__)
    return (
        f"{len(found)} activations have steps whose range is below {SMALL:.0%} of that over all steps "
        f"(least: {path}:{port}, {found[least]:.1%}); they get ranges by step, so that the result knows this sampler "
        "and number of steps alone: --set by_step=never for one range"
    )
