"""RMS norms in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.models.blocks.root_norm import RootNorm, gain
from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain

DTYPES = (torch.float32, torch.bfloat16)


class RootNormed(Chain):
    """The norm alone: what is done with its output is left to whoever called it."""

    def __init__(self, module: Any, declared: RootNorm) -> None:
        super().__init__(module)
        self.declared = declared

    def fused(self, *args: Any, **kwargs: Any) -> Tensor:
        weight, eps = gain(self.module), self.module.eps
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.dim() < 2 or x.dtype not in DTYPES:
            return self.unfused(*args, **kwargs)  # type: ignore[no-any-return]
        if weight is None or self.declared.keeps:
            return ops.rms_norm(x, weight, eps, x.dtype)
        if weight.dtype not in (x.dtype, torch.float32):  # which is rounded in between
            return self.unfused(x)  # type: ignore[no-any-return]
        return ops.rms_norm(x, weight, eps, weight.dtype)
