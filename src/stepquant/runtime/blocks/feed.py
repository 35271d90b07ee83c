"""Feed-forwards: the activation writes the codes that the last layer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.models.blocks.feed import Feed
from stepquant.runtime import ops
from stepquant.runtime.blocks.attention import Readers
from stepquant.runtime.blocks.chain import Chain, kernel_of, run
from stepquant.runtime.ops.code import Code


class FeedForward(Chain):
    """Wide layers as one product, activation and quantizing in one pass, and the narrow layer."""

    def __init__(self, module: Any, declared: Feed) -> None:
        super().__init__(module, *module.children())
        self.activation = declared.activation
        self.widen = Readers(*(module.get_submodule(name) for name in declared.widen))
        self.narrow = module.get_submodule(declared.narrow)
        self.joints = (self.widen,)

    def fused(self, *args: Any, **kwargs: Any) -> Tensor:
        x = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(x, Tensor) or len(args) + len(kwargs) != 1 or x.dim() < 2:
            return self.unfused(*args, **kwargs)  # type: ignore[no-any-return]
        return self.of(x, x.dtype)

    def of(
        self, x: Tensor, dtype: torch.dtype, into: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """Of floats or of codes, in `dtype`; times the gate of each sample, added to `into`."""
        code = self.code()
        codes = x if code is None or x.dtype == torch.uint8 else ops.quantize(x, code)
        wide = self.widen.side_by_side(codes.reshape(-1, x.shape[-1]), dtype)
        return run(
            self.narrow,
            activated(wide, self.activation, self.narrow).unflatten(0, x.shape[:-1]),
            dtype,
            into,
            gate,
        )

    def code(self) -> Code | None:
        """What a norm in front may write; None if the wide layers read floats."""
        return self.widen.code()

    def state(self) -> list[Any]:
        return [self.widen.joins]


def activated(wide: Tensor, activation: str, layer: Any) -> Tensor:
    """What `layer` reads of an activation: codes, or floats."""
    kernel = kernel_of(layer)
    return (
        ops.activate(wide, activation)
        if kernel is None
        else ops.activation_quantize(wide, activation, kernel.code)
    )
