"""The GEMM or convolution of one layer, as a device runs it: packed weight, scales and bias."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from stepquant.runtime.ops.code import Code


@dataclass(frozen=True)
class Geometry:
    """Stride, padding (the same on both sides), dilation and groups of a two-dimensional convolution."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Kernel(ABC):
    """A weight of signed bytes, packed at the first call, with the scales and bias of its epilogue.

    `weight` yields the signed bytes on demand, so that only the packed copies stay in memory.
    """

    leaves_added = True  # whether a tensor that the epilogue adds (`into`) keeps its numbers

    def __init__(
        self,
        weight: Callable[[], Tensor],
        scales: Tensor,
        bias: Tensor | None,
        code: Code,
        geometry: Geometry,
    ) -> None:
        self.weight, self.scales, self.bias, self.code = weight, scales.contiguous(), bias, code
        self.geometry = geometry
        self.packed: dict[Any, Tensor] = {}

    def with_code(self, code: Code) -> Self:
        """The same weight behind another input code; both use the same packed copies."""
        twin = copy.copy(self)
        twin.code = code
        return twin

    def with_codes(self, codes: Sequence[Code]) -> tuple[Self, ...]:
        """One for each code; this one is the first."""
        return (self, *map(self.with_code, codes[1:]))

    @classmethod
    def joined(cls, kernels: Sequence[Kernel]) -> Self:
        """One kernel for several that read the same codes; its outputs lie side by side."""
        biases = [torch.zeros_like(k.scales) if k.bias is None else k.bias for k in kernels]

        def weight() -> Tensor:
            return torch.cat([kernel.weight() for kernel in kernels])

        scales = torch.cat([kernel.scales for kernel in kernels])
        return cls(weight, scales, torch.cat(biases), kernels[0].code, kernels[0].geometry)

    def adds_branch(self, codes: Tensor) -> bool:
        """Whether the epilogue for these codes multiplies the sides of a low-rank branch."""
        return False

    @abstractmethod
    def __call__(self, codes: Tensor, *args: Any) -> Tensor: ...


def gated(y: Tensor, gate: Tensor, into: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of `y` times the gate of their sample, plus `into`: what products do where their epilogue does not."""
    rows = y.float().unflatten(0, (len(gate), -1)) * gate.float()[:, None]
    rows = rows.flatten(0, 1)
    return (rows if into is None else rows + into.float()).to(dtype)
