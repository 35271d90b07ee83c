"""A pretended second device: tensors that say they lie there, and refuse to meet those of the processor.

Their numbers are computed in plain torch, as on a device that registers no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from stepquant.runtime import ops


class Module(_DummyBackendModule):
    """What `torch.pretended` is; other tests of this process are not to find an accelerator that they could use."""

    def is_available(self) -> bool:
        return False


_setup_privateuseone_for_python_backend("pretended", Module())
DEVICE = torch.device("pretended", 0)
PLAIN = {op.overload: op for op in vars(ops).values() if isinstance(op, ops.Operation)}


class Pretended(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held})"


class There(TorchDispatchMode):
    """While entered, tensors can be made on the pretended device, and copied to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = pytree.tree_leaves((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    there = any(isinstance(value, Pretended) for value in tensors)
    target = kwargs.get("device")
    goes = there if target is None else torch.device(target).type == DEVICE.type
    if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        strangers = [tuple(t.shape) for t in tensors if there and not isinstance(t, Pretended) and t.dim()]
        if strangers:
            raise RuntimeError(f"{func} meets tensors of two devices: {strangers} on cpu")
    with torch.utils._python_dispatch._disable_current_modes():
        given, named = pytree.tree_map_only(Pretended, lambda t: t.held, (args, kwargs))
        if "device" in named:
            named["device"] = torch.device("cpu")
        plain = PLAIN.get(func)
        out = func(*given, **named) if plain is None else plain.flat(*given, **named)
    if not goes:
        return out
    made = {id(value.held): value for value in tensors if isinstance(value, Pretended)}
    return pytree.tree_map_only(Tensor, lambda t: made[id(t)] if id(t) in made else Pretended(t), out)


@contextmanager
def pretended(module: nn.Module) -> Iterator[nn.Module]:
    """`module`, moved to the pretended device as `module.to` would."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with There():
            yield module._apply(lambda tensor: Pretended(tensor.detach()))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def fetched(value: Any) -> Any:
    return pytree.tree_map_only(Pretended, lambda tensor: tensor.held, value)
