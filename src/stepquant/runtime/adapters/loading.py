"""What a quantized model does when somebody loads an adapter into it, or fuses one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stepquant.errors import RuntimeSupportError

# Methods of diffusers' models that put adapters into them or take them out.
CHANGING = ("load_lora_adapter", "add_adapter", "unload_lora", "delete_adapters")


class Changing:
    """Takes the place of such a method: peft learns of integer layers before it runs, and blocks are fused anew behind it."""

    def __init__(self, model: Any, name: str, fuse: Callable[[], Any]) -> None:
        self.model, self.name, self.fuse = model, name, fuse

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        teach_peft()
        try:
            with device_told(self.model):
                made = getattr(type(self.model), self.name)(self.model, *args, **kwargs)
        except (TypeError, ValueError) as error:
            if "not supported" not in str(error):
                raise
            raise RuntimeSupportError(
                f"{self.name}(): this kind of adapter has no form beside a quantized layer",
                got=str(error).splitlines()[0][:200],
                expected="a LoRA of linears and convolutions",
                fix="apply it to the float pipeline, fuse it there, and quantize that",
            ) from error
        self.fuse()
        return made


@contextmanager
def device_told(model: Any) -> Iterator[None]:
    """peft asks the first parameter for its device, and a model may hold packed layers alone."""
    if next(model.parameters(), None) is not None:
        yield
        return
    model.parameters = model.buffers
    try:
        yield
    finally:
        del model.parameters


class NoFusingLora:
    """Takes the place of `fuse_lora`, before anything was scaled."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *_: Any, **__: Any) -> None:
        from stepquant.runtime.adapters.lora import cannot_fuse

        raise cannot_fuse(type(self.model).__name__)


def take_adapters(model: Any, fuse: Callable[[], Any]) -> None:
    """Let `model` take LoRA; whoever has imported peft may also inject it himself."""
    for name in CHANGING:
        if hasattr(type(model), name):
            setattr(model, name, Changing(model, name, fuse))
    if hasattr(type(model), "fuse_lora"):
        model.fuse_lora = NoFusingLora(model)
    if "peft" in sys.modules:
        teach_peft()


def teach_peft() -> None:
    """Who has no peft is told so by diffusers."""
    try:
        from stepquant.runtime.adapters.lora import register
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        return
    register()
