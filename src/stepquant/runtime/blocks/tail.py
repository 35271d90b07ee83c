"""The last norm and activation fused: they write the codes that the output convolution reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain, kernel_of


class NormOut(Chain):
    """The last norm and activation, in one; writes the codes that the head reads."""

    def __init__(self, module: Any, activation: Any, head: Any, model: Any) -> None:
        super().__init__(module, module, activation, head, within=model)
        self.head = head

    def fused(self, x: Tensor) -> Tensor:
        norm, kernel = self.module, kernel_of(self.head)
        if kernel is None:
            return ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, "silu")
        return ops.group_norm_quantize(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, kernel.code, "silu"
        )


class Done(Chain):
    """An activation that the operation before it has already applied."""

    def __init__(self, module: Any, before: NormOut) -> None:
        super().__init__(module)
        self.swallowed = before.swallowed  # both go the same way

    def fused(self, x: Tensor) -> Tensor:
        return x
