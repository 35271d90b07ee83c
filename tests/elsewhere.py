"""A device that is not the CPU, for machines that have no other: its tensors refuse to meet those of the CPU.

Every operation on it is that of the CPU, so that its numbers are those of the CPU to the bit. Setting it up changes the
process for good: it belongs into a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "elsewhere"
KEPT: list[Any] = []
# What a GPU does with tensors on two devices: copies, and rows by numbers that are on the CPU.
ACROSS = ("_to_copy", "copy_", "copy", "index", "index_put", "index_put_", "_index_put_impl_")


class There(Tensor):
    """A tensor on that device; its numbers are in `here`."""

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        return Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(KIND, 0),
            requires_grad=here.requires_grad,
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return perform(operation, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While it is active, tensors can be made on the device."""

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return perform(operation, args, kwargs or {})


def perform(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = operation.overloadpacket.__name__, list(tensors_in((*args, *kwargs.values())))
    there = any(isinstance(x, There) for x in tensors)
    if there and name not in ACROSS and any(x.ndim and not isinstance(x, There) for x in tensors):
        raise RuntimeError(f"{operation} of tensors on two devices")
    numbers = {key: taken(value) for key, value in kwargs.items()}
    if (device := kwargs.get("device")) is not None:
        numbers["device"], there = torch.device("cpu"), torch.device(device).type == KIND
    out = operation(*taken(args), **numbers)
    if name.endswith("_") and not name.startswith("_"):
        return args[0]
    return given(out) if there else out


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def taken(x: Any) -> Any:
    """The same with numbers that the CPU can read."""
    if isinstance(x, list | tuple):
        return type(x)(map(taken, x))
    return x.here if isinstance(x, There) else x


def given(x: Any) -> Any:
    """The same on the device."""
    if isinstance(x, list | tuple):
        return type(x)(map(given, x))
    return There(x) if isinstance(x, Tensor) else x


def set_up() -> None:
    """Once, before anything computes a gradient."""
    _setup_privateuseone_for_python_backend(KIND)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", make_empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    KEPT.append(library)


def make_empty(size: Any, stride: Any, *, device: Any = None, **kind: Any) -> Tensor:
    """`torch.tensor` asks for this behind the mode's back."""
    return There(torch.empty_strided(size, stride, dtype=kind.get("dtype")))


def copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    taken(to).copy_(taken(source))
    return to
