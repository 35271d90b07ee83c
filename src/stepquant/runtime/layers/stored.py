"""Modules whose buffers are tensors of the artifact, and what is derived from them once and kept."""

from __future__ import annotations

import ctypes
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.codebook import evenly
from stepquant.core.grid import Grid, GridError
from stepquant.runtime.kernel import Kernel, Moves
from stepquant.runtime.layers.offloaded import OFFLOADED
from stepquant.runtime.ops.code import Code

PAGE_OUT = 21  # Linux since 5.4; Python has no name for it


@dataclass(frozen=True, eq=False)
class Versions:
    """Tensors, and how often each of them had been written to. Equal: the same tensors, with the same numbers."""

    tensors: tuple[Tensor, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None]) -> Versions:
        present = tuple(tensor for tensor in tensors if tensor is not None)
        return cls(present, tuple(map(count_of, present)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Versions):
            return NotImplemented
        return self.counts == other.counts and all(map(is_, self.tensors, other.tensors))

    __hash__ = None  # type: ignore[assignment]


def count_of(tensor: Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a module derives from its buffers: made whole and replaced whole.

    Another value means that something changed, so whoever keeps what follows from one compares by identity.
    """

    versions: Versions  # of the buffers


@dataclass(frozen=True, eq=False)
class PreparedLayer(Prepared):
    """How a layer computes; there are as many codes as rows of input ranges, and as many kernels or none."""

    reason: str | None  # why it does not multiply integers
    codes: tuple[Code, ...]
    kernels: tuple[Kernel, ...]
    moves: tuple[Moves, ...]  # one for each code, where the input has codebooks
    weights: dict[torch.dtype, Tensor]  # dequantized, by the dtype of the first input that needed it
    stored_rows: int = 0  # as many rows of floats at most meet the weight as it is stored


P = TypeVar("P", bound=Prepared)


class Stored(nn.Module, ABC, Generic[P]):
    """Buffers that move with the model, and keep the dtypes they have on disk when it is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.ready: P | None = None
        self.register_load_state_dict_post_hook(forget_loaded)

    def prepared(self) -> P:
        """What follows from the buffers as they are now."""
        ready = self.ready
        if ready is None or self.edited(ready.versions):
            ready = self.ready = self.prepare(Versions.of(self._buffers.values()))
        return ready

    @abstractmethod
    def prepare(self, versions: Versions) -> P:
        """Derive everything from the buffers."""

    def edited(self, versions: Versions) -> bool:
        """Whether a buffer was written to or replaced since; who offloads replaces them by the same numbers."""
        if torch.compiler.is_compiling() or OFFLOADED in self.__dict__:
            return False
        return Versions.of(self._buffers.values()) != versions

    def forget(self) -> None:
        """Derive everything anew at the next need."""
        self.ready = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        former = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in former.items():
            now = self._buffers[name]
            if value is not None and now is not None and now.dtype != value.dtype:
                self._buffers[name] = value.to(now.device)
        self.forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are opaque to copy and pickle, and are derived again when needed.
        return self.__dict__ | {"ready": None}


class Ranged(Stored[P]):
    """What reads one row of its ranges at a time, where there is one for every step; in a step in float it reads none."""

    def __init__(self) -> None:
        super().__init__()
        self.row = 0
        self.in_floats = False

    def register_range(
        self, port: str, grid: Grid, groups: int, device: torch.device, own_bits: bool = False
    ) -> None:
        """Buffers for the range of one operand, and for the bits of each row where they differ."""
        count = groups if grid.granularity == "step" else 1
        self.register_buffer(f"{port}_scale", torch.ones(count, device=device))
        self.register_buffer(f"{port}_zero_point", torch.zeros(count, dtype=torch.int32, device=device))
        if grid.codebook:
            codebook = evenly(grid.levels, 0).to(device, torch.uint8)
            self.register_buffer(f"{port}_codebook", codebook.repeat(count, 1))
        if own_bits:
            bits = torch.full((count,), grid.bits, dtype=torch.int32, device=device)
            self.register_buffer(f"{port}_bits", bits)

    def select(self, row: int) -> None:
        """Read this row of the ranges from now on; what was packed serves them all."""
        self.row = row


class Balanced(Ranged[P]):
    """A layer that may have a factor for each channel of its input, by which it is multiplied before it is quantized."""

    input_factors: Tensor
    spec: LayerSpec
    weight_shape: torch.Size

    def make_factors(self, layer: nn.Module) -> None:
        if not self.spec.balanced:
            return
        if getattr(layer, "groups", 1) != 1:
            raise GridError("factors are for channels that every output reads, and groups read their own")
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.register_buffer("input_factors", torch.ones(weight.shape[1], device=weight.device))

    def over_channels(self) -> Tensor:
        """The factors over the weight, and over what is multiplied with it."""
        return self.input_factors.reshape(-1, *[1] * (len(self.weight_shape) - 2))

    def balanced(self, x: Tensor) -> Tensor:
        return x * self.over_channels() if self.spec.balanced else x

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight that is multiplied with balanced inputs."""

    def total_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight of the float layer that this one stands for."""
        if not self.spec.balanced:
            return self.dequantized(dtype)
        return (self.dequantized(torch.float32) * self.over_channels()).to(dtype)


def forget_loaded(module: nn.Module, _keys: object) -> None:
    """What loading a state dict does to what was derived from the former one."""
    module.forget()  # type: ignore[operator]


def not_needed_soon(tensor: Tensor) -> None:
    """Let the system take back the memory of bytes that were read from a file, until they are asked for again.

    They stay true whatever happens: pages that were written to are no longer those of the file, and are kept.
    """
    advise = None if torch.compiler.is_compiling() else page_advice()
    if advise is None or not tensor.is_cpu or not tensor.is_contiguous():
        return
    begin, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), PAGE_OUT)  # mere advice: it may fail


@cache
def page_advice() -> Any:
    """The system's `madvise`; None where there is none."""
    try:
        return ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        return None
