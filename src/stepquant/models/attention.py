"""Attention products by rebinding: a processor keeps its own code and gets another product through its globals.

A wrapper around a processor silently loses the arguments that `Attention.forward` filters by signature;
running the same bytecode over other globals keeps signature, rotary embeddings and masks as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.errors import ModelError

Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
serial = count()  # torch.compile caches globals by module name, so that none may be used twice


def rebind(attention: nn.Module, product: Product, site: str) -> Any:
    """Give `attention` the product `product(query, key, value, mask, scale)`; returns the former processor."""
    former = attention.processor
    attention.processor = rebound(former, product, site)
    return former


def rebound(processor: Any, product: Product, site: str) -> Any:
    call = type(processor).__call__
    if not {"scaled_dot_product_attention", "dispatch_attention_fn"} & names_used(call.__code__):
        raise ModelError(
            f"attention '{site}' computes its product inline",
            got=type(processor).__name__,
            expected="a processor built on scaled_dot_product_attention",
            fix="undo attention slicing or set_default_attn_processor() before quantizing",
        )

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa or dropout_p:
            raise ModelError(
                f"attention '{site}' is causal, grouped or uses dropout", fix="keep its product in float"
            )
        return product(query, key, value, attn_mask, scale)

    def dispatch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {
            k: v for k, v in kwargs.items() if k not in ("attention_kwargs", "backend", "parallel_config")
        }
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return attend(query, key, value, *args, **kwargs).transpose(1, 2)

    name = f"stepquant_attention_{next(serial)}"
    world: Any = module_like(name, call.__globals__)
    world.F = module_like(f"{name}_F", vars(F))
    world.F.scaled_dot_product_attention, world.dispatch_attention_fn = attend, dispatch
    bound = FunctionType(call.__code__, vars(world), call.__name__, call.__defaults__, call.__closure__)
    bound.__kwdefaults__ = call.__kwdefaults__
    kind: Any = type(type(processor).__name__, (type(processor),), {"__call__": bound})
    new = kind.__new__(kind)
    new.__dict__.update(processor.__dict__)
    return new


def names_used(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*(names_used(constant) for constant in inner))


def module_like(name: str, names: dict[str, Any]) -> ModuleType:
    """A module with these names, known to the import system because torch.compile looks globals up there."""
    module = ModuleType(name)
    vars(module).update({k: v for k, v in names.items() if k not in ("__name__", "__spec__", "__loader__")})
    sys.modules[name] = module
    return module
