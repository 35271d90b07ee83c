"""The plan that an automatic scheme stands for: sites probed on a few recorded states, bits chosen exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from stepquant.calib.guided import State, states_of
from stepquant.calib.pick import every, strided
from stepquant.calib.record import Source
from stepquant.core.knapsack import check_fits
from stepquant.core.pack import packed_bytes
from stepquant.core.policy import FloatSteps
from stepquant.evaluate.study.allocate import Sensitivity, allocate
from stepquant.evaluate.study.probes import estimate
from stepquant.evaluate.study.sites import StudiedSite, plan_with, studied_sites
from stepquant.models.denoiser import Denoiser
from stepquant.quant.auto import BITS, NEUTRAL, Budget
from stepquant.quant.plan import Plan

TRAJECTORIES, STATES = 4, 8  # of each


def automatic(denoiser: Denoiser, budget: Budget, source: Source, spared: FloatSteps | None = None) -> Plan:
    """Weights within their bytes, then inputs within their share of the products at steps in integers."""
    base = budget.base()
    data = source.record(every(TRAJECTORIES, strided(source.steps, STATES)))
    ports = ("weight",) if budget.inputs == max(BITS) else ("weight", "input")
    sites = studied_sites(denoiser, base, data.take([0]).arguments, ports)
    weights = [site for site in sites if site.port == "weight"]
    room = room_for(weights, budget)
    check_fits(sum(site.bytes(min(BITS)) for site in weights), room)
    states = states_of(data, source)
    asked: list[tuple[Sequence[StudiedSite], list[State]]] = [(sites, states)]
    if spared is not None and "input" in ports:
        inner = {*data.rounded(spared)}
        kept = [state for state in states if inner.issuperset(state.records)]
        asked = [(weights, states), ([site for site in sites if site.port == "input"], kept or states)]
    losses: dict[tuple[str, int], float] = {}
    for some, where in asked:
        losses |= estimate(denoiser, base, some, BITS, data, where, source.progress).losses
    known = Sensitivity(base, tuple(sites), losses, BITS)
    bits = dict(allocate(known, "bytes", room).bits)
    if "input" in ports:
        work = budget.inputs * sum(site.macs for site in sites if site.port == "input")
        bits |= allocate(known, "inputs", work).bits
    reasons = {key: reason_of(known, key, width) for key, width in bits.items()}
    return replace(plan_with(budget.name, base, bits, sites, reasons), float_steps=spared)


def room_for(weights: Sequence[StudiedSite], budget: Budget) -> int:
    """The bytes that weights may take, scales and zero points included."""
    if budget.bytes is not None:
        return budget.bytes
    assert budget.bits is not None
    scales = sum(site.bytes(NEUTRAL) - packed_bytes(site.weights, NEUTRAL) for site in weights)
    return math.ceil(budget.bits * sum(site.weights for site in weights) / 8) + scales


def reason_of(known: Sensitivity, key: str, width: int | None) -> str:
    bits = max(known.bits) if width is None else width
    moved = f"{bits} bits move the prediction by {100 * math.sqrt(known.losses[key, bits]):.2g} %"
    return f"float, where {moved}" if width is None else moved
