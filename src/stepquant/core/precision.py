"""Where a processor multiplies in bfloat16 by itself, so that using it saves time, and where it does so wrongly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multiplies_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are done by instructions of their own there."""
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(has for name, has in capabilities.items() if name.endswith("_bf16"))
    return bool(getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)())


def loses_gradients(x: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether the gradient of the weight of a convolution over `x` would be computed in bfloat16, and be wrong.

    Where a kernel is longer than its input, torch 2.13 returns memory as it lay there for some of the taps and may write
    beyond it: a kernel of 3x1x1 over 2 frames does, and in 1 and 2 dimensions one with a stride of 2 over a width of 1.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if x.device.type != "cpu" or dtype != torch.bfloat16:
        return False
    spans = [(taps - 1) * step + 1 for taps, step in zip(kernel, dilation)]
    return any(span > size for span, size in zip(spans, x.shape[-len(spans) :]))
