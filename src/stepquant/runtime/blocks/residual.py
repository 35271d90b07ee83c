"""Fused residual blocks: norm, activation and quantizing in one pass, the residual added in the epilogue."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.models.blocks.residual import ResidualBlock
from stepquant.runtime.blocks.chain import Chain, NormThen, addable, read_raw
from stepquant.runtime.blocks.time_rows import TimeRows


class Residual(Chain):
    """A residual block. `skip` is the half of its input that would have been concatenated."""

    def __init__(self, module: Any, declared: ResidualBlock, times: TimeRows | None, index: int) -> None:
        self.shortcut = module.conv_shortcut if declared.shortcut else None
        inside = (module.norm1, module.conv1, module.norm2, module.conv2, self.shortcut)
        super().__init__(module, *inside, module.nonlinearity, module.dropout)
        self.declared, self.times, self.index = declared, times, index
        self.first = NormThen(module.norm1, "silu", module.conv1)
        self.second = NormThen(module.norm2, "silu", module.conv2)

    def unfused(self, input_tensor: Tensor, *args: Any, skip: Tensor | None = None, **kwargs: Any) -> Any:
        x = input_tensor
        return super().unfused(x if skip is None else torch.cat([x, skip], dim=1), *args, **kwargs)

    def fused(
        self, input_tensor: Tensor, temb: Tensor | None = None, *_: Any, skip: Tensor | None = None, **__: Any
    ) -> Tensor:
        x = input_tensor
        hidden = self.first(x, None, skip)
        kept = addable(x, self.module.conv2) if self.shortcut is None else read_raw(self.shortcut, x, skip)
        out = self.second(hidden, self.time_row(temb, len(x)), None, kept)
        return out if self.declared.divisor == 1.0 else out / self.declared.divisor

    def time_row(self, temb: Tensor | None, batch: int) -> Tensor | None:
        if temb is None or not self.declared.timed:
            return None
        row = self.times.block(self.index, temb) if self.times is not None else None
        if row is None:
            return self.module.time_emb_proj(F.silu(temb))
        return row if batch == 1 else row.expand(batch, -1)
