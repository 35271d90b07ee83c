"""Modules inside a fused block whose own forward is skipped, and how to tell that somebody hooked into one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stepquant.runtime.adapters.present import Layout
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.offloaded import OFFLOADED


class Swallowed:
    """These modules and all inside them, but for attention products, which are called as ever."""

    def __init__(self, *modules: nn.Module | None, within: nn.Module | None = None) -> None:
        """`within` is the module whose children they are, or whose forward leaves them out."""
        inside = [one for module in modules if module is not None for one in module.modules()]
        self.modules = [module for module in inside if not isinstance(module, IntegerProduct)]
        self.forwards = [module.__dict__.get("forward") for module in self.modules]
        self.layout = Layout(module for module in (within, *inside) if module is not None)

    def awaited(self) -> bool:
        """Whether a hook or a foreign forward hangs on one of them, or another module took the place of one, or floats
        are asked of it, so that they have to be called themselves."""
        return self.layout.changed() or any(map(is_awaited, self.modules, self.forwards))

    def learns(self) -> bool:
        """Whether gradients are wanted of something inside: operations on codes have none."""
        return torch.is_grad_enabled() and any(
            own.requires_grad
            for module in self.modules
            for own in module._parameters.values()
            if own is not None
        )

    def __enter__(self) -> None:
        """Bring the tensors of those that are offloaded."""
        for module in self.modules:
            if OFFLOADED in module.__dict__:
                module.__dict__[OFFLOADED].pre_forward(module)

    def __exit__(self, *error: object) -> None:
        for module in self.modules:
            if OFFLOADED in module.__dict__:
                module.__dict__[OFFLOADED].post_forward(module, None)


def is_awaited(module: nn.Module, forward: Any) -> bool:
    attributes = module.__dict__
    hooked = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
    if hooked or attributes.get("in_floats"):  # a step in float, which codes have no part in
        return True
    now = attributes.get("forward")
    return now is not forward and OFFLOADED not in attributes and not hasattr(now, "goes_along")
