"""Modules that multiply query, key, value and probabilities: what they are, and how their product is exchanged."""

from __future__ import annotations

from typing import Any

from torch import nn

from stepquant.models.attention import Inside, KeepProduct, Product, given, rebound
from stepquant.models.families.roles import PRODUCTS, WRITTEN_OUT
from stepquant.models.interface import LookedUp, looks_up_its_product


def multiplies(module: nn.Module) -> bool:
    """Whether it is an attention, with a product that may be exchanged."""
    return isinstance(module, PRODUCTS) or looks_up_its_product(module)


def rebind(attention: Any, product: Product, site: str) -> None:
    """Give `attention` the product `product(query, key, value, mask, scale)`."""
    if looks_up_its_product(attention):
        attention.forward = LookedUp(attention, product, site)
    elif isinstance(attention, WRITTEN_OUT):
        attention.forward = Inside(attention, product, site)  # type: ignore[method-assign]
    else:
        attention.processor = rebound(given(getattr(attention, "processor", None)), product, site)


def give_back(attention: Any) -> None:
    """Let an attention compute its product as its own library does."""
    if isinstance(vars(attention).get("forward"), LookedUp | Inside):
        del attention.forward
        return
    processor = given(attention.processor)
    if isinstance(vars(attention).get("set_processor"), KeepProduct):
        del attention.set_processor
    attention.processor = processor
