"""Moving a model to another device: all of it, or an error that says what it needs and a model that is where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from stepquant.errors import RuntimeSupportError

FULL = ("out of memory", "can't allocate memory", "failed to allocate")


class Move:
    """Takes the place of the `_apply` of a model, which `to`, `cuda` and `cpu` go through."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        model = self.model
        if getattr(model, "is_quantized", False):
            refuse_cast(fn)
        former = [Place(module) for module in model.modules()]
        size = bytes_of(chain(model.parameters(), model.buffers()))
        try:
            with room_for(size, lambda: device_after(fn)):
                return type(model)._apply(model, fn, recurse)
        except BaseException:
            for place in former:
                place.restore()
            raise


def refuse_cast(fn: Callable[[Tensor], Tensor]) -> None:
    """`bfloat16()` and `double()` of a model; diffusers itself refuses `half()`, `float()` and `to(dtype)`."""
    for dtype in (torch.float32, torch.bfloat16):
        try:
            became = fn(torch.empty(0, dtype=dtype)).dtype
        except RuntimeError:
            return  # a device that is not there: whoever moves says so
        if became != dtype:
            raise RuntimeSupportError(
                f"a quantized model cannot be cast to {str(became).removeprefix('torch.')} once it is there",
                fix="from_pretrained(..., dtype=torch.bfloat16), which its float parts follow",
            )


class Place:
    """Where the tensors of one module are; a parameter mostly stays the same and gets other data."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.parameters, self.buffers = module, dict(module._parameters), dict(module._buffers)
        self.data = {name: own.data for name, own in self.parameters.items() if own is not None}

    def restore(self) -> None:
        self.module._parameters.update(self.parameters)
        self.module._buffers.update(self.buffers)
        for name, value in self.data.items():
            self.module._parameters[name].data = value  # type: ignore[union-attr]


def is_full(error: RuntimeError) -> bool:
    """Whether an error says that a device had no room."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in FULL)


@contextmanager
def room_for(size: int, device: object) -> Iterator[None]:
    """While open, an error that `device` (which a function may tell) is full says how many bytes are needed."""
    try:
        yield
    except RuntimeError as error:
        if not is_full(error):
            raise
        raise RuntimeSupportError(
            f"device '{device() if callable(device) else device}' cannot hold the quantized model",
            got=str(error).splitlines()[0][:200],
            expected=f"{size:,} bytes free for its tensors, and more for packed copies of its weights",
            fix="free memory there, run the model where it was, or let its parts come one by one: "
            "pipe.enable_sequential_cpu_offload()",
        ) from error


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def device_after(fn: Callable[[Tensor], Tensor]) -> object:
    """Where `fn` takes tensors."""
    try:
        return fn(torch.empty(0)).device
    except RuntimeError:
        return "asked for"


def one_device(device_map: str | Mapping[str, object]) -> torch.device:
    """Where a `device_map` of diffusers puts the whole network; where torch may choose, the accelerator if there is one."""
    if isinstance(device_map, str):
        places = {str(torch.accelerator.current_accelerator(check_available=True) or "cpu")}
    else:
        places = {str(place) for place in device_map.values()}
    if len(places) > 1 or places & {"disk", "meta"}:
        raise RuntimeSupportError(
            "a quantized denoiser lies on one device, because its blocks run as one",
            got=f"device_map={device_map}",
            expected="one device for all of it: device_map='cpu' or device_map={'': 'cpu'}",
            fix="leave parts to accelerate after loading: pipe.enable_sequential_cpu_offload()",
        )
    place = places.pop()
    try:
        device = torch.device(int(place) if place.isdigit() else place)
        return torch.empty(1, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise RuntimeSupportError(
            f"there is no device '{place}' to load the model to",
            got=str(error).splitlines()[0][:200],
            fix="device_map='cpu', or a torch that was built for that device",
        ) from error
