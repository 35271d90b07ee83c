"""Adapters around the layers of a model, told without importing peft: who has none pays nothing for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import nn

INNER = "base_layer"  # what peft calls the layer inside an adapter


class Layout:
    """Which modules lie in others; tells when one was replaced, as who loads or unloads adapters does."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.now = [module._modules for module in modules if module._modules]
        self.former = [dict(places) for places in self.now]

    def changed(self) -> bool:
        return self.now != self.former


def layer_inside(module: Any) -> Any:
    """The layer that lies in an adapter; another module itself."""
    while INNER in module._modules:
        module = module._modules[INNER]
    return module


def acting(module: Any) -> Any:
    """The layer inside of an adapter that adds nothing at present; another module itself."""
    while INNER in module._modules and is_idle(module):
        module = module._modules[INNER]
    return module


def is_idle(adapter: Any) -> bool:
    if getattr(adapter, "disable_adapters", False):
        return True
    branches = getattr(adapter, "lora_A", None)
    return branches is not None and not any(name in branches for name in adapter.active_adapters)


def adapters_in(*modules: nn.Module) -> list[nn.Module]:
    return [inner for module in modules for inner in module.modules() if INNER in inner._modules]


def settings_of(adapters: Iterable[Any]) -> list[Any]:
    """What decides, besides tensors, what adapters add: equal only while they add the same."""
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    found = [[getattr(adapter, name, None) for name in names] for adapter in adapters]
    return [[value.copy() if isinstance(value, list | dict) else value for value in row] for row in found]


@contextmanager
def scaled(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments without the scale of all adapters that pipelines put into them; it holds while this is open."""
    left, scale = dict(arguments), 1.0
    for name, value in arguments.items():
        if name.endswith("attention_kwargs") and isinstance(value, Mapping) and "scale" in value:
            left[name] = {key: inner for key, inner in value.items() if key != "scale"}
            scale = float(value["scale"])
    scale_lora_layers(model, scale)
    try:
        yield left
    finally:
        unscale_lora_layers(model, scale)
