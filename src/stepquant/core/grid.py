"""Grid: the frozen description of a set of integers and of how finely scales are shared."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, cast

from stepquant.errors import StepquantError

Granularity = Literal["tensor", "channel", "group", "token", "step", "log"]
AS_THEY_COME = ("token", "log")  # whose scales are found with the numbers, and have no range
GRAMMAR = "[u]int<2..8>/<tensor|channel|group<N>|token|step|log>[/sym|/asym|/codebook], for example int8/channel, uint8/tensor, int4/group32"
SIGNED_CODEBOOKS = {"weight": True, "input": False}  # by port; operands of attention have none
FLOAT_BITS = 32  # of what has no grid
MOST_CODEBOOK = 4  # bits of weights: the integers of a codebook stand beside those of each channel
PATTERN = re.compile(
    r"(u?)int([0-9]{1,9})/(tensor|channel|token|step|log|group([0-9]{1,9}))(?:/(sym|asym|codebook))?"
)


class GridError(StepquantError):
    """A grid that cannot exist, or a tensor that does not fit it."""


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits; `int8/channel` is signed and symmetric, `uint8/tensor` unsigned with a zero point.

    `step` shares a scale over a tensor too, but has one for every step of the sampler, or group of steps.
    `token` has one for every row that a linear reads, or image that a convolution reads: found as they come, never stored.
    `log` has powers of two of the greatest number of each row, of numbers that are never negative: found as they come, too.
    A symmetric grid has zero point 0 and drops the lowest signed value, so that -q exists for every q.
    `int4/channel/codebook` has 16 integers of a byte for each channel, chosen for its weights, and names one by 4 bits;
    `uint4/tensor/codebook` has 16 of the integers of `uint8/tensor`, chosen for an activation.
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = "tensor"
    group: int = 0
    codebook: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise GridError(f"a grid has 2 to 8 bits, not {self.bits}", expected=GRAMMAR)
        if (self.granularity == "group") != (self.group > 0):
            raise GridError(f"a group grid names its group size, not {self.group}", expected=GRAMMAR)
        if self.granularity == "log" and (self.signed or self.symmetric):
            raise GridError("powers of two have no sign", expected="uint8/log, for example")
        of_weights = self.signed and self.symmetric and self.granularity == "channel"
        of_inputs = not self.signed and not self.symmetric and self.granularity in ("tensor", "step")
        if self.codebook and not (of_inputs or (of_weights and self.bits <= MOST_CODEBOOK)):
            raise GridError(
                "codebooks are for the weights of channels, and for activations with a zero point",
                expected=f"int2/channel/codebook to int{MOST_CODEBOOK}/channel/codebook, or uint4/tensor/codebook, for example",
            )

    @property
    def width(self) -> int:
        """Bits of the integers that are multiplied."""
        return 8 if self.codebook else self.bits

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        return -(2 ** (self.width - 1)) + (1 if self.symmetric else 0)

    @property
    def qmax(self) -> int:
        return 2 ** (self.width - 1) - 1 if self.signed else 2**self.width - 1

    @property
    def levels(self) -> int:
        """How many integers it has."""
        return 2**self.bits if self.codebook else self.qmax - self.qmin + 1

    def at(self, bits: int) -> Grid:
        """The same with another number of bits; signed bytes are symmetric, because less a zero point they would be none.

        Those of weights stay up to 3 bits: the 16 bytes of 4 for each channel cost rows of hundreds of weights what they gain.
        """
        codebook = self.codebook and bits < (MOST_CODEBOOK if self.signed else 8)
        codebook |= self.codebook and bits == self.bits
        symmetric = self.symmetric and codebook == self.codebook
        return replace(self, bits=bits, codebook=codebook, symmetric=symmetric or (self.signed and bits == 8))

    @classmethod
    def parse(cls, text: str) -> Grid:
        found = PATTERN.fullmatch(text.strip())
        if not found:
            raise GridError(f"cannot read the grid '{text}'", expected=GRAMMAR)
        unsigned, bits, shared, group, shape = found.groups()
        granularity = cast(Granularity, "group" if group else shared)
        return cls(
            bits=int(bits),
            signed=not unsigned,
            symmetric=(shape == "sym") if shape in ("sym", "asym") else not unsigned,
            granularity=granularity,
            group=int(group or 0),
            codebook=shape == "codebook",
        )

    def __str__(self) -> str:
        shape = "" if self.symmetric == self.signed else "/sym" if self.symmetric else "/asym"
        shape = "/codebook" if self.codebook else shape
        share = f"group{self.group}" if self.granularity == "group" else self.granularity
        return f"{'' if self.signed else 'u'}int{self.bits}/{share}{shape}"
