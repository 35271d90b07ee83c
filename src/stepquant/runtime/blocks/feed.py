"""Feed-forwards: the activation writes the codes that the last layer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.models.blocks.feed import Feed, ImageFeed
from stepquant.runtime import ops
from stepquant.runtime.blocks.attention import Readers
from stepquant.runtime.blocks.chain import Chain, codes_for, kernel_of, run
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


class ImageFeedForward(Chain):
    """Three convolutions, with an activation and quantizing in one pass behind the first and the second."""

    def __init__(self, module: Any, declared: ImageFeed) -> None:
        super().__init__(module, *module.children())

    def fused(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        if x.dim() != 4:
            return self.unfused(x)  # type: ignore[no-any-return]
        return self.of(codes_for(self.module.conv_inverted, x), x.dtype)

    def of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Of an image of floats or of codes, in `dtype`."""
        module = self.module
        wide = activated(run(module.conv_inverted, x, dtype), "silu", module.conv_depth)
        deep = run(module.conv_depth, wide, dtype).permute(0, 2, 3, 1)
        return run(module.conv_point, activated(deep, "swiglu", module.conv_point).permute(0, 3, 1, 2), dtype)

    def code(self) -> Code | None:
        """What a norm in front may write; None if the first convolution reads floats."""
        kernel = kernel_of(self.module.conv_inverted)
        return None if kernel is None else kernel.code


def activated(wide: Tensor, activation: str, layer: Any) -> Tensor:
    """What `layer` reads of an activation: codes, or floats."""
    kernel = kernel_of(layer)
    return (
        ops.activate(wide, activation)
        if kernel is None
        else ops.activation_quantize(wide, activation, kernel.code)
    )
