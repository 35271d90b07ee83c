"""Where a processor multiplies in bfloat16 by itself, so that using it saves time."""

from __future__ import annotations

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are done by instructions of their own there."""
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(has for name, has in capabilities.items() if name.endswith("_bf16"))
    return bool(getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)())
