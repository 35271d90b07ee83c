"""Chains: fused forwards of blocks, in which a norm or activation writes the codes that the next integer layer reads.

Each class here takes the place of the `forward` of one block, on the instance; the block keeps its class, its
children and the names of its tensors. For arguments that it cannot take, it calls the forward of the block's own class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.models.split import SplitLayer
from stepquant.runtime import ops
from stepquant.runtime.adapters.present import acting, layer_inside
from stepquant.runtime.blocks.swallowed import Swallowed
from stepquant.runtime.layers.layer import IntegerLayer


class Chain(ABC):
    """What stands in for the forward of `module`; `swallowed` are modules inside whose own calls it leaves out."""

    joints: Sequence[Any] = ()  # groups of its layers that share one product
    mixes: Sequence[Any] = ()  # the products of its attentions
    goes_along = True  # its module runs as it would by itself

    def __init__(self, module: Any, *swallowed: Any, within: Any = None) -> None:
        """`within`: where all of that lies, if not in `module`."""
        self.module, self.swallowed = module, Swallowed(*swallowed, within=within or module)
        # torch.compile looks for no methods in a class that diffusers lets it take as it is.
        self.own_forward = type(module).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # whoever compiles has what runs now, and no hook
            return self.fused(*args, **kwargs)
        if self.swallowed.awaited() or self.learns(*args, *kwargs.values()):
            return self.unfused(*args, **kwargs)
        with self.swallowed:
            return self.fused(*args, **kwargs)

    def learns(self, *given: Any) -> bool:
        """Whether gradients are wanted of what it is given or of something inside: operations on codes have none."""
        if not torch.is_grad_enabled():
            return False
        tensors = (one for one in given if isinstance(one, Tensor))
        return any(one.requires_grad for one in chain(tensors, nn.Module.parameters(self.module)))

    def unfused(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_forward(self.module, *args, **kwargs)

    def state(self) -> list[Any]:
        """What decides, besides the arguments, between fused and unfused; compared by identity before a recorded call is replayed."""
        return []

    @abstractmethod
    def fused(self, *args: Any, **kwargs: Any) -> Any: ...


def chains(model: nn.Module) -> list[Chain]:
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, Chain)]


class NormThen:
    """Group norm, activation and the layer that reads it; the norm writes codes if that layer takes them."""

    def __init__(self, norm: Any, activation: str, layer: Any) -> None:
        self.norm, self.activation, self.layer = norm, activation, layer

    def __call__(
        self, x: Tensor, add: Tensor | None = None, skip: Tensor | None = None, into: Tensor | None = None
    ) -> Tensor:
        return run(self.layer, self.normed(x, add, skip), x.dtype, into)

    def normed(self, x: Tensor, add: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """What the layer reads: codes, or floats if it computes in float."""
        kernel, norm = kernel_of(self.layer), self.norm
        norming = (x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        if kernel is None:
            return ops.group_norm(*norming, self.activation, add, None, None, skip)
        return ops.group_norm_quantize(*norming, kernel.code, self.activation, add, None, None, skip)


def kernel_of(layer: Any) -> Any:
    """The integer kernel of a layer, or None if it computes in float."""
    if isinstance(layer, IntegerLayer):
        return layer.kernel
    inside = acting(layer)
    return inside.kernel if isinstance(inside, IntegerLayer) else None


def codes_for(layer: Any, x: Tensor) -> Tensor:
    """`x` as `layer` reads it: codes, or as it is."""
    kernel = kernel_of(layer)
    return x if kernel is None else ops.quantize(x, kernel.code)


def run(
    layer: Any, x: Tensor, dtype: torch.dtype, into: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """`layer` on codes, put out in `dtype`, or on floats; added to `into`, which may be consumed.

    `gate` (samples, outputs) multiplies what a linear makes of each sample first.
    """
    if x.dtype == torch.uint8:
        named = {} if gate is None else {"gate": gate}
        return layer_inside(layer).from_codes(x, dtype, into, **named)  # type: ignore[no-any-return]
    y = layer(x)
    if gate is not None:
        y = y * gate.reshape(len(gate), *(1,) * (x.dim() - 2), -1)
    return y if into is None else y + into  # type: ignore[no-any-return]


def read_raw(layer: Any, x: Tensor, skip: Tensor | None) -> Tensor:
    """`layer` on concat(x, skip), quantized without concatenating floats, in memory that may be written to."""
    if skip is None:
        return layer(x)
    kernel = kernel_of(layer)
    if kernel is not None:
        codes = ops.quantize_concat(x, skip, kernel.code)
        return layer_inside(layer).from_codes(codes, x.dtype)  # type: ignore[no-any-return]
    if isinstance(layer, SplitLayer) and layer.widths == (x.shape[1], skip.shape[1]):
        first, second = layer.children()
        return run(second, codes_for(second, skip), x.dtype, first(x))
    return layer(torch.cat([x, skip], dim=1))


def addable(x: Tensor, layer: Any) -> Tensor:
    """`x`, or a copy of it where `layer` may write into what it adds."""
    kernel = kernel_of(layer)
    return x.clone() if kernel is not None and not kernel.leaves_added else x


def pixels(x: Tensor) -> Tensor:
    """(batch * height * width, channels) of an image."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
