"""The sites of a model that a plan quantizes, with what each costs; and plans that give each its own number of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stepquant.core.affine import to_groups
from stepquant.core.grid import Grid, GridError
from stepquant.core.pack import packed_bytes
from stepquant.errors import EvaluationError
from stepquant.evaluate.cost import count_macs
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import Plan, Rule


@dataclass(frozen=True)
class StudiedSite:
    """A tensor that is quantized: where it is, its grid in the base plan, and its part in the model's cost."""

    path: str
    role: str
    port: str
    grid: str
    macs: int  # of the layer or product, an image
    weights: int = 0  # numbers that are packed, and scales beside them; none for activations
    scales: int = 0
    split: bool = False  # methods may store the layer as two

    @property
    def key(self) -> str:
        return f"{self.path}:{self.port}"

    def bytes(self, bits: int) -> int:
        """On disk: packed weights, a scale of four bytes each, and zero points of two or codebooks where the grid has them."""
        grid = self.at(bits)
        extra = 4 + 2 * (not grid.symmetric) + grid.levels * grid.codebook
        return packed_bytes(self.weights, bits) + extra * self.scales

    def at(self, bits: int) -> Grid:
        """The site's grid with another number of bits."""
        try:
            return Grid.parse(self.grid).at(bits)
        except GridError as error:
            raise EvaluationError(f"'{self.key}' cannot have {bits} bits", expected="2 to 8") from error

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def studied_sites(
    denoiser: Denoiser, plan: Plan, arguments: Mapping[str, Any], ports: Sequence[str] = ()
) -> tuple[StudiedSite, ...]:
    """Every site (of these ports) to which `plan` gives a grid; what it keeps float is not studied."""
    macs, concats = count_macs(denoiser, arguments), denoiser.concats()
    found = []
    for decision in plan.resolve(denoiser).values():
        if decision.grid is None or (ports and decision.port not in ports):
            continue
        site = StudiedSite(
            decision.path,
            decision.role,
            decision.port,
            str(decision.grid),
            macs.get(decision.path, 0),
            split=decision.path in concats,
        )
        if decision.port == "weight":
            weight: Any = denoiser.model.get_submodule(decision.path).weight
            scales = len(to_groups(weight.detach(), decision.grid))
            site = replace(site, weights=weight.numel(), scales=scales)
        found.append(site)
    if not found:
        raise EvaluationError(
            f"plan '{plan.name}' quantizes nothing that was asked for",
            fix="choose another --scheme or --ports",
        )
    return tuple(found)


def plan_with(
    name: str,
    base: Plan,
    bits: Mapping[str, int | None],
    sites: Sequence[StudiedSite],
    reasons: Mapping[str, str] | None = None,
) -> Plan:
    """`base` with another number of bits for the sites in `bits`, by key; None keeps a site float.

    The rules of `base` stay behind for everything else, and may find nothing left to decide.
    """
    known = reasons or {}
    rules = []
    for site in sites:
        if site.key not in bits:
            continue
        width = bits[site.key]
        plain = "float: worth its cost" if width is None else f"{width} bits of the budget"
        reason = known.get(site.key, plain)
        rule = Rule(None if width is None else site.at(width), reason, ("*",), (site.port,), site.path)
        rules.append(rule)
        if site.split:
            rules.append(replace(rule, path=f"{site.path}.[01]", optional=True))
            rules[-2] = replace(rule, optional=True)
    return replace(base, name=name, rules=(*rules, *(replace(rule, optional=True) for rule in base.rules)))
