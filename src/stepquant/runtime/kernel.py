"""The GEMM or convolution of one layer, as a device runs it: packed weight, scales and bias."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.ops.code import Code


@dataclass(frozen=True)
class Geometry:
    """Stride, padding (the same on both sides), dilation and groups of a two-dimensional convolution."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Moves:
    """To which of the 256 bytes codes are moved before they are multiplied, where an input has a codebook."""

    bytes: bytes
    table: Tensor = field(compare=False)

    @classmethod
    def of(cls, table: Tensor) -> Moves:
        return cls(bytes(table.cpu().tolist()), table)


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
        self.moves: Moves | None = None

    @property
    def reads(self) -> tuple[Code, Moves | None]:
        """What codes are to be, and what becomes of them first: kernels that agree in both can be one."""
        return self.code, self.moves

    def with_code(self, code: Code, moves: Moves | None = None) -> Self:
        """The same weight behind another input code; both use the same packed copies."""
        twin = copy.copy(self)
        twin.code, twin.moves = code, moves
        return twin

    def with_codes(self, codes: Sequence[Code], moves: Sequence[Moves | None] = ()) -> tuple[Self, ...]:
        """One for each code."""
        return tuple(self.with_code(*one) for one in zip(codes, moves or (None,) * len(codes)))

    @classmethod
    def joined(cls, kernels: Sequence[Kernel]) -> Self:
        """One kernel for several that read the same codes; its outputs lie side by side."""
        biases = [torch.zeros_like(k.scales) if k.bias is None else k.bias for k in kernels]

        def weight() -> Tensor:
            return torch.cat([kernel.weight() for kernel in kernels])

        scales = torch.cat([kernel.scales for kernel in kernels])
        joint = cls(weight, scales, torch.cat(biases), kernels[0].code, kernels[0].geometry)
        joint.moves = kernels[0].moves
        return joint

    def adds_branch(self, codes: Tensor) -> bool:
        """Whether the epilogue for these codes multiplies the sides of a low-rank branch."""
        return False

    def __call__(self, codes: Tensor, *args: Any) -> Tensor:
        """The product of codes; what else it takes is the device's."""
        return self.multiply(codes if self.moves is None else ops.move_codes(codes, self.moves.table), *args)

    @abstractmethod
    def multiply(self, codes: Tensor, *args: Any) -> Tensor: ...


def gated(y: Tensor, gate: Tensor, into: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of `y` times the gate of their sample, plus `into`: what products do where their epilogue does not."""
    rows = y.float().unflatten(0, (len(gate), -1)) * gate.float()[:, None]
    rows = rows.flatten(0, 1)
    return (rows if into is None else rows + into.float()).to(dtype)
