"""Schemes that name a budget: how many bits weights and activations have on average, wherever they count most."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from stepquant.core.grid import FLOAT_BITS, Grid
from stepquant.errors import PlanError
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import bulk, protections

AUTO = "auto-4.5"
FORMS = {
    AUTO: "4.5 bits a weight on average, more where they count; 8-bit activations",
    "auto-4.5a6": "6 bits an activation on average too, each counted as often as it is multiplied; above 8, some in float",
    "auto-2000000bytes": "weights and their scales in so many bytes",
}
PATTERN = re.compile(r"auto-(?P<number>\d+(\.\d+)?)(?P<bytes>bytes)?(a(?P<inputs>\d+(\.\d+)?))?")
BITS = (2, 3, 4, 5, 6, 8)
NEUTRAL = 4  # bits of the weights where a budget of bytes does not tell


@dataclass(frozen=True)
class Budget:
    """What a plan may cost."""

    name: str
    bits: float | None  # of a weight, on average
    bytes: int | None
    inputs: float  # bits of an activation, on average

    @classmethod
    def of(cls, name: str | None) -> Budget | None:
        """The budget that the scheme of this name stands for; None if it is no such scheme."""
        if name is None or name.partition("-")[0] != "auto":
            return None
        found = PATTERN.fullmatch(name)
        number, inputs = (float(found["number"]), float(found["inputs"] or 8)) if found else (0.0, 0.0)
        counts_bytes = found is not None and found["bytes"] is not None
        weights = counts_bytes or min(BITS) <= number <= max(BITS)
        if not (weights and min(BITS) <= inputs <= FLOAT_BITS):
            raise PlanError(
                "no scheme has this name",
                got=name,
                expected=f"{', '.join(FORMS)}; 2 to 8 bits a weight, 2 to {FLOAT_BITS} an activation",
            )
        if counts_bytes:
            return cls(name, None, int(number), inputs)
        return cls(name, number, None, inputs)

    def base(self) -> Plan:
        """What is allocated from: every weight alike, and in float what reads t or the prompt alone.

        Weights have zero points, or codebooks where the average is below 4 bits: of 2 bits a symmetric grid has three levels.
        What layers read has codebooks below 8 bits.
        """
        bits = NEUTRAL if self.bits is None else int(self.bits)
        few = bits < NEUTRAL
        weight = Grid(bits, symmetric=few, granularity="channel", codebook=few).at(bits)
        kept = [rule for rule in protections(8, 8) if rule.ports != ("weight",)]
        rules = bulk(weight, min(int(self.inputs), max(BITS)))
        return Plan(self.name, (*kept, *map(with_codebook, rules)))


def with_codebook(rule: Rule) -> Rule:
    """Activations of few bits lie where their numbers are many, not at equal distances."""
    grid = rule.grid
    if grid is None or rule.ports != ("input",) or grid.bits == max(BITS):
        return rule
    return replace(rule, grid=replace(grid, codebook=True))
