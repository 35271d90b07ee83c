"""Which activations change so much from step to step that one range would not serve all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.core.slices import Slices
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import Place, insert
from stepquant.quant.plan import Plan
from stepquant.quant.quantizer import Quantizer, Site

SMALL = 1 / 8  # three bits of a range over all steps are not used at that step
RECORDS = 2  # of every step
Steps = dict[int, Tensor]  # the least and the greatest number at each


def uneven(
    denoiser: Denoiser, plan: Plan, data: CalibSet, *, split: bool = False, small: float = SMALL
) -> dict[Place, float]:
    """The activations whose range at some step is a small part of their range over all, and how small a part.

    Seen in float, so that no range has to be known: while the records were made, or else in calls for it alone.
    Probabilities sum to 1 at every step, and do not count.
    """
    with torch.no_grad(), insert(denoiser, plan, split=split) as network:
        network.switch(weights=False, inputs=False)
        quantizers = [q for q in network.ranged() if q.site.port != "probabilities"]
        if not quantizers:
            return {}
        chosen = few_of_each(data)
        found = ends_recorded([q.site for q in quantizers], data, chosen)
        if found is None:
            found = ends_passed(denoiser, quantizers, data, chosen)
    spans = {place: [span(ends) for ends in steps.values()] for place, steps in found.items() if steps}
    parts = {place: min(own) / (max(own) or 1.0) for place, own in spans.items()}
    return {place: part for place, part in parts.items() if part < small}


def few_of_each(data: CalibSet) -> dict[int, list[int]]:
    """Some records of every step that was recorded."""
    chosen: dict[int, list[int]] = {}
    for record, step in enumerate(data.steps().tolist()):
        if len(chosen.setdefault(step, [])) < RECORDS:
            chosen[step].append(record)
    return chosen


def span(ends: Tensor) -> float:
    """How far zero and all values lie apart."""
    low, high = (end.item() for end in ends)
    return float(max(high, 0.0) - min(low, 0.0))


def ends_recorded(
    sites: Sequence[Site], data: CalibSet, chosen: Mapping[int, Sequence[int]]
) -> dict[Place, Steps] | None:
    """The ends of each site as they were when these records were made; None where not all were seen."""
    known = {step: data.ends(records) for step, records in chosen.items()}
    found: dict[Place, Steps] = {}
    for site in sites:
        if any(str(site) not in ends for ends in known.values()):
            return None
        each = {step: ends[str(site)] for step, ends in known.items()}
        both = {step: torch.stack([ends[:, 0].amin(), ends[:, 1].amax()]) for step, ends in each.items()}
        read = {step: ends for step, ends in both.items() if not ends[0] > ends[1]}
        # A layer may be left out of a call; an attention that shows no operands multiplies them in a way of its own.
        if any(ends.isnan().any() for ends in read.values()) or (
            site.port != "input" and len(read) < len(both)
        ):
            return None
        found[site.path, site.port] = read
    return found


def ends_passed(
    denoiser: Denoiser, quantizers: Sequence[Quantizer], data: CalibSet, chosen: Mapping[int, Sequence[int]]
) -> dict[Place, Steps]:
    """The ends of what each quantizer sees in these records."""
    found: dict[Place, Steps] = {}
    for step, records in chosen.items():
        for quantizer in quantizers:
            quantizer.observer = widening(step, found)
        denoiser.predict(data.take(records).arguments)
    return found


def widening(step: int, found: dict[Place, Steps]) -> Callable[[Quantizer, Slices], None]:
    """Notes the ends of all values that a quantizer sees."""

    def observe(quantizer: Quantizer, values: Slices) -> None:
        steps = found.setdefault((quantizer.site.path, quantizer.site.port), {})
        low, high = (end.reshape(()) for end in values.ends)
        known = steps.get(step, torch.stack([low, high]))
        steps[step] = torch.stack([torch.minimum(known[0], low), torch.maximum(known[1], high)])

    return observe


def described(found: Mapping[Place, float]) -> str:
    """What was found, for whoever reads along."""
    path, port = least = min(found, key=found.__getitem__)
    return (
        f"{len(found)} activations have steps whose range is below {SMALL:.0%} of that over all steps "
        f"(least: {path}:{port}, {found[least]:.1%}); they get ranges by step, so that the result knows this sampler "
        "and number of steps alone: --set by_step=never for one range"
    )
