"""Bits for every site under a budget of bytes, bit operations or milliseconds, from a known sensitivity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from stepquant.core.grid import FLOAT_BITS
from stepquant.core.knapsack import choose, shared_out
from stepquant.errors import EvaluationError, UnknownNameError
from stepquant.evaluate.study.sites import StudiedSite, plan_with
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import CONTENT

Budget = Literal["bytes", "inputs", "bops", "ms"]
DECOUPLED = "decoupled"
# A loss that adds up over sites, computed from the value of each metric.
LOSSES = {
    "noise": lambda value: value**2,
    "psnr": lambda value: 10 ** (-value / 10),
    "ssim": lambda value: 1 - value,
    "features": lambda value: value**2,
}
# The operands of one product: their bits are chosen together, because the cost depends on both.
TOGETHER = (("weight", "input"), ("query", "key"), ("probabilities", "value"))


@dataclass(frozen=True)
class Option:
    """One option of a choice: bits of its sites (None: float), their cost, and the loss to expect."""

    bits: tuple[int | None, ...]
    cost: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """Sites whose bits are decided together, and the options that there are."""

    sites: tuple[StudiedSite, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """The plan, what it costs and is expected to lose, and the same for every uniform number of bits."""

    plan: Plan
    bits: Mapping[str, int | None]
    cost: float
    loss: float
    uniform: Mapping[int, tuple[float, float]]  # bits -> cost, loss

    def counts(self) -> dict[str, int]:
        """How many sites got how many bits."""
        found = Counter("float" if width is None else str(width) for width in self.bits.values())
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Sensitivity:
    """A study as its file holds it."""

    plan: Plan
    sites: tuple[StudiedSite, ...]
    losses: Mapping[tuple[str, int], float]  # site key and bits -> loss
    bits: tuple[int, ...]


def read_sensitivity(data: Mapping[str, Any], metric: str) -> Sensitivity:
    """The losses of a study by one metric, or by one metric for content and another for quality."""
    try:
        sites = tuple(StudiedSite(**site) for site in data["sites"])
        plan, bits = Plan.from_json(data["plan"]), tuple(sorted(data["study"]["bits"]))
        values: dict[str, dict[tuple[str, int], float]] = {}
        for row in data["rows"]:
            key = (f"{row['path']}:{row['port']}", int(row["bits"]))
            values.setdefault(row["metric"], {})[key] = LOSSES[row["metric"]](float(row["value"]))
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"this is no sensitivity study: {type(error).__name__} {error}",
            expected="a file that `stepquant sensitivity` wrote",
        ) from error
    wanted = ("ssim", "features") if metric == DECOUPLED else (metric,)
    for name in wanted:
        if name not in values:
            raise UnknownNameError("metric of this study", name, [*values, DECOUPLED])
    losses = decoupled(sites, values) if metric == DECOUPLED else values[metric]
    missing = [site.key for site in sites for width in bits if (site.key, width) not in losses]
    if missing:
        raise EvaluationError(
            "the study is not complete", got=f"nothing about {missing[0]}", fix="run it again"
        )
    return Sensitivity(plan, sites, losses, bits)


def decoupled(
    sites: Sequence[StudiedSite], values: Mapping[str, Mapping[tuple[str, int], float]]
) -> dict[tuple[str, int], float]:
    """Losses of content sites by SSIM and of quality sites by features, each divided by the total loss of its group.

    Differs: arXiv:2405.17873 solves both groups apart and searches how to divide the budget; one problem with shares
    divides it by itself.
    """
    found: dict[tuple[str, int], float] = {}
    for content, name in ((True, "ssim"), (False, "features")):
        keys = {site.key for site in sites if (site.role in CONTENT) == content}
        found |= shared_out({key: max(loss, 0.0) for key, loss in values[name].items() if key[0] in keys})
    return found


def allocate(
    study: Sensitivity, kind: Budget, budget: float, times: Mapping[tuple[str, bool], float] | None = None
) -> Allocation:
    """The plan of least expected loss within the budget.

    times: milliseconds by layer path and whether it multiplies integers; for a budget of milliseconds.
    """
    choices = {
        "bytes": lambda: byte_choices(study),
        "inputs": lambda: input_choices(study, budget),
        "bops": lambda: bop_choices(study),
        "ms": lambda: time_choices(study, times or {}),
    }[kind]()
    picked = choose(
        [[option.loss for option in choice.options] for choice in choices],
        [[option.cost for option in choice.options] for choice in choices],
        budget,
    )
    chosen = [choice.options[index] for choice, index in zip(choices, picked)]
    bits = {
        site.key: width
        for choice, option in zip(choices, chosen)
        for site, width in zip(choice.sites, option.bits)
    }
    return Allocation(
        plan_with(f"allocated-{kind}", study.plan, bits, study.sites),
        bits,
        sum(option.cost for option in chosen),
        sum(option.loss for option in chosen),
        {width: uniform_of(choices, width) for width in study.bits},
    )


def uniform_of(choices: Sequence[Choice], width: int) -> tuple[float, float]:
    """Cost and loss where every site has the same bits."""
    found = [option for choice in choices for option in choice.options if set(option.bits) == {width}]
    return sum(option.cost for option in found), sum(option.loss for option in found)


def byte_choices(study: Sensitivity) -> list[Choice]:
    """One choice for each weight: activations take no bytes in a file."""
    return [
        Choice((site,), tuple(Option((b,), site.bytes(b), study.losses[site.key, b]) for b in study.bits))
        for site in study.sites
        if site.port == "weight"
    ]


def input_choices(study: Sensitivity, budget: float) -> list[Choice]:
    """One choice for each input of a layer: its bits count as often as they are multiplied.

    What a budget leaves where all have the most bits buys inputs in float, whose layers multiply floats.
    """
    sites = [site for site in study.sites if site.port == "input"]
    most = max(study.bits)
    spare = budget > most * sum(site.macs for site in sites)
    widths: tuple[int | None, ...] = (most, None) if spare else study.bits
    return [Choice((site,), tuple(input_option(study, site, width) for width in widths)) for site in sites]


def input_option(study: Sensitivity, site: StudiedSite, width: int | None) -> Option:
    loss = 0.0 if width is None else study.losses[site.key, width]
    return Option((width,), (width or FLOAT_BITS) * site.macs, loss)


def bop_choices(study: Sensitivity) -> list[Choice]:
    """Bits of both operands multiply: they are chosen together. An operand that the plan keeps float has 32 bits."""
    choices, ports = [], {(site.path, site.port): site for site in study.sites}
    for first, second in TOGETHER:
        paths = dict.fromkeys(path for path, port in ports if port in (first, second))
        for path in paths:
            sites = tuple(ports[path, port] for port in (first, second) if (path, port) in ports)
            # A product of attention is two products of matrices.
            macs = sites[0].macs // (1 if first == "weight" else 2)
            choices.append(Choice(sites, tuple(bop_options(study, sites, macs))))
    return choices


def bop_options(study: Sensitivity, sites: Sequence[StudiedSite], macs: int) -> list[Option]:
    out = []
    for widths in product(study.bits, repeat=len(sites)):
        other = 1 if len(sites) > 1 else FLOAT_BITS
        bops = macs * other
        for width in widths:
            bops *= width
        loss = sum(study.losses[site.key, width] for site, width in zip(sites, widths))
        out.append(Option(widths, bops, loss))
    return out


def time_choices(study: Sensitivity, times: Mapping[tuple[str, bool], float]) -> list[Choice]:
    """One choice for each layer that was timed: integers of every number of bits, or float without loss."""
    choices = []
    for path in dict.fromkeys(site.path for site in study.sites):
        sites = tuple(site for site in study.sites if site.path == path)
        if (path, True) not in times or (path, False) not in times:
            continue
        options = [Option((None,) * len(sites), times[path, False], 0.0)]
        for width in study.bits:
            loss = sum(study.losses[site.key, width] for site in sites)
            options.append(Option((width,) * len(sites), times[path, True], loss))
        choices.append(Choice(sites, tuple(options)))
    if not choices:
        raise EvaluationError(
            "no layer of this study was timed",
            fix="time the layers of an artifact of the same model: stepquant layers DIR --out times.json",
        )
    return choices
