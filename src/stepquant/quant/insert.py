"""Insert quantizers into a model, in place and reversibly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from stepquant.errors import PlanError
from stepquant.models.attention import rebind
from stepquant.models.denoiser import Denoiser
from stepquant.models.split import split_concats
from stepquant.quant.attention import QuantProduct
from stepquant.quant.layers import QuantLayer
from stepquant.quant.plan import PORTS, Plan
from stepquant.quant.quantizer import Quantizer, Site


@dataclass(frozen=True)
class Inserted:
    """A model with quantizers in it, by path."""

    denoiser: Denoiser
    plan: Plan
    layers: Mapping[str, QuantLayer]
    products: Mapping[str, QuantProduct]
    splits: Mapping[str, tuple[int, ...]]

    def quantizers(self) -> Iterator[Quantizer]:
        """All quantizers in module order."""
        for layer in self.layers.values():
            yield from (q for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None)
        for product in self.products.values():
            yield from product.ports().values()

    def switch(self, *, weights: bool, inputs: bool) -> None:
        """Turn weight quantizers, and all quantizers of activations, on or off."""
        for quantizer in self.quantizers():
            quantizer.enabled = weights if quantizer.site.port == "weight" else inputs


@contextmanager
def insert(denoiser: Denoiser, plan: Plan, *, split: bool = False) -> Iterator[Inserted]:
    """Put quantizers where `plan` wants them, and the float modules back at the end.

    With `split`, layers that read a concatenation get two weight and two input quantizers.
    """
    model, splits = denoiser.model, denoiser.concats() if split else {}
    unsplit = split_concats(model, splits)
    try:
        decisions = plan.resolve(denoiser)
    except PlanError:
        unsplit()
        raise
    layers, products, former = {}, {}, {}

    def quantizer(path: str, role: str, port: Any) -> Quantizer | None:
        grid = decisions[path, port].grid
        return Quantizer(grid, Site(path, role, port)).to(device_of(model)) if grid is not None else None

    for path, role in denoiser.sites().items():
        weight, inputs = quantizer(path, role, "weight"), quantizer(path, role, "input")
        if weight is None and inputs is None:
            continue
        layer = model.get_submodule(path)
        layers[path] = QuantLayer(layer, role, weight, inputs)
        former[path] = layer
        model.set_submodule(path, layers[path])
    for path in denoiser.products():
        ports = {port: quantizer(path, "product", port) for port in PORTS["product"]}
        if any(port is None for port in ports.values()):
            continue
        attention = model.get_submodule(path)
        products[path] = QuantProduct(**ports)  # type: ignore[arg-type]
        attention.product = products[path]  # type: ignore[assignment]
        former[path] = rebind(attention, products[path], path)

    try:
        yield Inserted(denoiser, plan, layers, products, splits)
    finally:
        for path in layers:
            model.set_submodule(path, former[path])
        for path in products:
            attention = model.get_submodule(path)
            attention.processor = former[path]
            del attention.product
        unsplit()


def device_of(model: nn.Module) -> Any:
    return next(model.parameters()).device
