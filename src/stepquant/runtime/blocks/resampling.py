"""Down- and upsampling of codes instead of floats."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.models.blocks.resampling import Resampler
from stepquant.runtime import ops
from stepquant.runtime.adapters.present import layer_inside
from stepquant.runtime.blocks.chain import Chain, kernel_of


class Resample(Chain):
    """A down- or upsampling convolution; pixels are doubled and borders added on bytes, a quarter of the traffic."""

    def __init__(self, module: Any, declared: Resampler) -> None:
        super().__init__(module, *module.children())
        self.declared, self.conv = declared, module.conv

    def fused(self, hidden_states: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
        x, kernel = hidden_states, kernel_of(self.conv)
        if kernel is None:
            return self.unfused(x, output_size) if self.declared.doubles else self.unfused(x)
        codes = ops.quantize(x.contiguous(memory_format=torch.channels_last), kernel.code)
        if self.declared.doubles and output_size is not None:
            codes = F.interpolate(codes, size=output_size, mode="nearest")
        doubled = self.declared.doubles and output_size is None
        return layer_inside(self.conv).from_codes(codes, x.dtype, None, self.declared.border, doubled)
