"""Attention products of models of transformers: their own code, with another product behind the function that they look up.

An attention there asks a registry for the function that multiplies. Its forward runs over other globals, in which the
registry has ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import ProductError
from stepquant.models.attention import Product, causal, module_like, names_used, own_code, serial, spread

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
KNOWN = "sdpa"  # what the registry calls the function of torch


def looks_up_its_product(module: nn.Module) -> bool:
    """Whether its class takes the function that multiplies from transformers' registry."""
    if not type(module).__module__.startswith("transformers."):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and REGISTRY in names_used(code)


class LookedUp:
    """Takes the place of the forward of an attention of transformers, whose product it exchanges, and of the registry."""

    def __init__(self, attention: nn.Module, product: Product, site: str) -> None:
        self.attention, self.product, self.site = attention, product, site
        own: Any = inspect.unwrap(type(attention).forward)
        world = module_like(f"stepquant_interface_{next(serial)}", own.__globals__ | {REGISTRY: self})
        self.own = FunctionType(own_code(own), vars(world), own.__name__, own.__defaults__, own.__closure__)
        self.own.__kwdefaults__ = own.__kwdefaults__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(self.attention, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.attention, self.product, self.site)

    def get_interface(self, name: str, _: Any = None) -> Callable[..., Any]:
        """The function that multiplies, whichever the model was to have."""
        if name != KNOWN:
            raise ProductError(
                f"attention '{self.site}' is computed by '{name}', whose masks and scores may be of its own kind",
                where=self.site,
                fix=f"load the model with attn_implementation='{KNOWN}', if its class has that",
            )
        return self.attend

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As transformers' function for scaled_dot_product_attention, but for the product."""
        if dropout or softcap is not None:
            raise ProductError(
                f"attention '{self.site}' drops or caps scores",
                where=self.site,
                fix="keep its product in float",
            )
        asked = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if asked and attention_mask is None and query.shape[2] > 1:
            attention_mask = causal(query, key)
        if position_bias is not None:
            attention_mask = with_bias(position_bias, attention_mask)
        out = self.product(query, spread(key, query), spread(value, query), attention_mask, scaling)
        return out.transpose(1, 2).contiguous(), None


def with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """What a mask says, and what places add."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
