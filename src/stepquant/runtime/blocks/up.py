"""Up blocks whose skip connections are concatenated as codes, not as floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepquant.models.blocks.up import UpBlock
from stepquant.runtime.blocks.chain import Chain
from stepquant.runtime.blocks.residual import Residual


class Up(Chain):
    """An up block whose residual blocks take hidden and skip side by side, without a float concatenation."""

    def __init__(self, module: Any, declared: UpBlock) -> None:
        super().__init__(module)
        self.declared = declared
        self.residuals = list(module.resnets)
        self.attentions = list(getattr(module, "attentions", None) or [None] * len(self.residuals))
        self.upsamplers = list(module.upsamplers or ())

    def fused(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if args or any(getattr(self.module, name, None) for name in self.declared.unless):
            return self.unfused(hidden_states, res_hidden_states_tuple, temb, *args, **kwargs)
        x, size = hidden_states, kwargs.pop("upsample_size", None)
        for residual, attention, skip in zip(
            self.residuals, self.attentions, reversed(res_hidden_states_tuple)
        ):
            if isinstance(residual.forward, Residual):
                x = residual(x, temb, skip=skip)
            else:
                x = residual(torch.cat([x, skip], dim=1), temb)
            if self.declared.textual:
                x = attention(x, **kwargs, return_dict=False)[0]
            elif attention is not None:
                x = attention(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, size) if self.declared.sized else upsampler(x)
        return x

    def state(self) -> list[Any]:
        attributes = self.module.__dict__
        return [attributes.get(name) for name in self.declared.unless]
