"""What a network says of its parameters when most or all of its numbers are packed: how many, in which dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.runtime.layers.packed import PackedWeight

MARK = "dtype_alone"  # an empty buffer, where diffusers looks for one to know a dtype by


def tell_parameters(module: Any) -> None:
    """Let a module without parameters name its float buffers when it is asked for some."""
    if any(True for _ in type(module).parameters(module)):
        return
    module.parameters = FloatBuffers(module)
    if not any(True for _ in module.buffers()):  # all in a table
        mark(module)


def mark_packed(model: nn.Module) -> None:
    """Let a model all of whose numbers are packed have a dtype, which its predictions have and pipelines ask for."""
    if not any(True for _ in model.parameters()):
        mark(model)
        model.parameters = MarkAlone(model)  # type: ignore[assignment, method-assign]


def mark(module: nn.Module) -> None:
    module.register_buffer(MARK, torch.empty(0, device="cpu"), persistent=False)


class FloatBuffers:
    """Takes the place of `parameters` of a module that holds integers alone: some models ask the first one for its dtype."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, recurse: bool = True) -> Iterator[Tensor]:
        found = [value for value in self.module.buffers(recurse) if value.is_floating_point()]
        return iter(found or [torch.empty(0)])


class MarkAlone:
    """Takes the place of `parameters` of a model all of whose numbers are packed, until adapters come beside them.

    Whoever asks the first one for the model's dtype and device gets them from an empty tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, recurse: bool = True) -> Iterator[Tensor]:
        own: list[Tensor] = list(type(self.model).parameters(self.model, recurse))
        return iter(own or [self.model.get_buffer(MARK)])


class Counted:
    """Takes the place of `num_parameters` of a model: weights count as ever, however many bytes they are packed in."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        floats = int(type(self.model).num_parameters(self.model, *args, **kwargs))
        trainable = kwargs.get("only_trainable", args[0] if args else False)
        return floats + (0 if trainable else sum(map(numbers_in, self.model.modules())))


def numbers_in(module: nn.Module) -> int:
    """How many floats its integers stand for, the bias beside them included."""
    if not isinstance(module, PackedWeight):
        return 0
    bias = getattr(module, "bias", None)
    return module.weight_shape.numel() + (0 if bias is None else bias.numel())
