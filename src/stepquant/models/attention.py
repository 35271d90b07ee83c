"""Attention products by rebinding: a processor keeps its own code and gets another product through its globals.

A wrapper around a processor silently loses the arguments that `Attention.forward` filters by signature;
running the same bytecode over other globals keeps signature, rotary embeddings and masks as they are.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from itertools import count
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.errors import ModelError, ProductError

Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
serial = count()  # torch.compile caches globals by module name, so that none may be used twice


def rebound(processor: Any, product: Product, site: str) -> Any:
    """`processor` with the product `product(query, key, value, mask, scale)`."""
    if not computes_by_function(processor):
        raise ProductError(
            f"attention '{site}' computes its product inline",
            where=site,
            got=type(processor).__name__,
            expected="a processor built on scaled_dot_product_attention",
            fix="undo attention slicing or set_default_attn_processor() before quantizing",
        )

    bound = over(type(processor).__call__, product, site)
    kind: Any = type(type(processor).__name__, (Rebound, type(processor)), {"__call__": bound})
    new = kind.__new__(kind)
    new.__dict__.update(processor.__dict__ | {"former": processor, "product": product, "site": site})
    return new


def over(call: Any, product: Product, site: str) -> FunctionType:
    """The same code, over other globals."""

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
        if dropout_p:
            raise ProductError(
                f"attention '{site}' uses dropout", where=site, fix="keep its product in float"
            )
        if is_causal:
            attn_mask = causal(query, key)
        if enable_gqa:
            key, value = spread(key, query), spread(value, query)
        return product(query, key, value, attn_mask, scale)

    def dispatch(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        kwargs = {
            k: v for k, v in kwargs.items() if k not in ("attention_kwargs", "backend", "parallel_config")
        }
        if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]  # of keys alone
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return attend(query, key, value, attn_mask, *args, **kwargs).transpose(1, 2)

    name = f"stepquant_attention_{next(serial)}"
    world: Any = module_like(name, call.__globals__)
    world.F = module_like(f"{name}_F", vars(F))
    world.F.scaled_dot_product_attention, world.dispatch_attention_fn = attend, dispatch
    bound = FunctionType(own_code(call), vars(world), call.__name__, call.__defaults__, call.__closure__)
    bound.__kwdefaults__ = call.__kwdefaults__
    return bound


def own_code(call: Any) -> CodeType:
    """The code of a function, to run over other globals than its own."""
    # torch.compile keeps what it made by the code alone: it would go on in the globals of another attention.
    code: CodeType = call.__code__.replace()
    return code


def causal(query: Tensor, key: Tensor) -> Tensor:
    """The mask in which a query reads the keys up to its own place."""
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]


def spread(x: Tensor, query: Tensor) -> Tensor:
    """A head of keys or values for every head of queries, which share them."""
    return x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], 1)


class Inside:
    """Takes the place of the forward of an attention that has its product written into it."""

    def __init__(self, attention: Any, product: Product, site: str) -> None:
        self.attention, self.product, self.site = attention, product, site
        self.own = over(type(attention).forward, product, site)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(self.attention, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.attention, self.product, self.site)


class Rebound:
    """A processor with another product. Its class is made at run time, so copies are made again from its parts."""

    former: Any
    product: Product
    site: str

    def __reduce__(self) -> tuple[Any, ...]:
        return rebound, (self.former, self.product, self.site)


def given(processor: Any) -> Any:
    """The processor that an attention was given, with its own product."""
    return processor.former if isinstance(processor, Rebound) else processor


class KeepProduct:
    """Takes the place of `set_processor` of an attention, whose product stays what it is."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.own: Rebound = attention.processor  # the last one that carries the product
        self.present = attention.processor

    def __call__(self, processor: Any) -> None:
        if isinstance(processor, Rebound) and "former" not in vars(processor):
            processor = self.own  # diffusers made another one of its class, which has nothing
        if not isinstance(processor, Rebound):
            processor = carrying(processor, self.own)
        if isinstance(processor, Rebound):
            self.own = processor
        type(self.attention).set_processor(self.attention, processor)
        self.present = self.attention.processor

    def catch_up(self) -> None:
        """Take a processor that was assigned to the attribute as one that was set."""
        if self.attention.processor is not self.present:
            self(self.attention.processor)


def is_adapter(processor: Any) -> bool:
    """Whether a processor brings layers: an IP-Adapter's, which attends to an image beside the text."""
    return getattr(processor, "to_k_ip", None) is not None


def carrying(processor: Any, own: Rebound) -> Any:
    """`processor` with the product of `own`, if it can have that; those of diffusers that cannot are left out."""
    name = type(processor).__name__
    if type(processor) is type(own.former) and vars(processor) == vars(own.former):
        return own
    if computes_by_function(processor):
        return rebound(processor, own.product, own.site)
    if type(processor).__module__.startswith("diffusers."):
        warnings.warn(
            f"{name} computes its product in float: the quantized attention keeps its own, which never holds all "
            "probabilities, so that slicing would save nothing",
            stacklevel=4,
        )
        return own
    warnings.warn(
        f"{name} computes its product itself, by all appearances in float: the attention is slower than in integers, and not "
        "what the quantization was measured on; build the processor on scaled_dot_product_attention to keep the integers",
        stacklevel=4,
    )
    return processor


class NoFusing:
    """Takes the place of `fuse_projections` of an attention whose weights are packed integers."""

    def __init__(self, site: str) -> None:
        self.site = site

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ModelError(
            f"the projections of attention '{self.site}' are quantized and cannot be concatenated",
            fix="leave fuse_qkv_projections() out: the integer runtime multiplies them as one already",
        )


def computes_by_function(processor: Any) -> bool:
    """Whether its product is a function that can be exchanged."""
    code = getattr(type(processor).__call__, "__code__", None)
    return code is not None and bool(
        {"scaled_dot_product_attention", "dispatch_attention_fn"} & names_used(code)
    )


def names_used(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*(names_used(constant) for constant in inner))


def module_like(name: str, names: dict[str, Any]) -> ModuleType:
    """A module with these names, known to the import system because torch.compile looks globals up there."""
    module = ModuleType(name)
    vars(module).update({k: v for k, v in names.items() if k not in ("__name__", "__spec__", "__loader__")})
    sys.modules[name] = module
    return module
