"""Insert quantizers into a model, in place and reversibly."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.core.grid import AS_THEY_COME, Grid
from stepquant.core.steps import StepTable
from stepquant.errors import PlanError
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.roles import embeddings_in
from stepquant.models.products import give_back, rebind
from stepquant.models.split import split_concats
from stepquant.quant.attention import QuantProduct
from stepquant.quant.layers import QuantLayer
from stepquant.quant.plan import PORTS, Plan
from stepquant.quant.quantizer import Clock, Quantizer, Site

Place = tuple[str, str]  # path and port


@dataclass(frozen=True)
class Inserted:
    """A model with quantizers in it, by path."""

    denoiser: Denoiser
    plan: Plan
    layers: Mapping[str, QuantLayer]
    products: Mapping[str, QuantProduct]
    splits: Mapping[str, tuple[int, ...]]
    clock: Clock | None = None  # where not all steps are alike
    tables: Mapping[str, QuantLayer] = field(default_factory=dict)  # of embeddings: weights alone

    def quantizers(self) -> Iterator[Quantizer]:
        """All quantizers in module order."""
        for layer in (*self.layers.values(), *self.tables.values()):
            yield from (q for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None)
        for product in self.products.values():
            yield from product.ports().values()

    def weighted(self) -> dict[str, QuantLayer]:
        """The layers and tables whose weights are quantized, by path."""
        every = {**self.layers, **self.tables}
        return {path: layer for path, layer in every.items() if layer.weight_quantizer is not None}

    def ranged(self) -> list[Quantizer]:
        """The quantizers of activations that have a range to set, in module order."""
        return [q for q in self.quantizers() if q.site.port != "weight" and not q.dynamic]

    def at(self, records: Tensor | slice) -> None:
        """The next call of a block is made of these records."""
        if self.clock is not None:
            self.clock.at(records)

    def switch(self, *, weights: bool, inputs: bool) -> None:
        """Turn weight quantizers, and all quantizers of activations, on or off."""
        for quantizer in self.quantizers():
            quantizer.enabled = weights if quantizer.site.port == "weight" else inputs


# From which dimension on operands of attention share a scale as it comes: a query has its own, all keys of a head have one.
FIRST = {"query": -1, "key": -2, "value": -2, "probabilities": -1}


@contextmanager
def insert(
    denoiser: Denoiser,
    plan: Plan,
    *,
    split: bool = False,
    steps: StepTable | None = None,
    only: Container[Place] | None = None,
) -> Iterator[Inserted]:
    """Put quantizers where `plan` wants them, and the float modules back at the end.

    With `split`, layers that read a concatenation get two weight and two input quantizers. With `steps`,
    activations have a range for every row of that table: all of them, or `only` those. At the steps that the plan
    keeps in float no activation is rounded.
    """
    model, splits = denoiser.model, denoiser.concats() if split else {}
    clock = Clock(steps, plan.float_steps) if steps is not None or plan.float_steps is not None else None
    unsplit = split_concats(model, splits)
    try:
        decisions = plan.resolve(denoiser)
    except PlanError:
        unsplit()
        raise
    products = {}

    def quantizer(path: str, role: str, port: Any) -> Quantizer | None:
        grid, site = decisions[path, port].grid, Site(path, role, port)
        if grid is None:
            return None
        if grid.granularity in AS_THEY_COME:
            first = FIRST.get(port, -1 if isinstance(model.get_submodule(path), nn.Linear) else 1)
            return Quantizer(grid, site, clock, first).to(denoiser.device)
        if port == "weight":
            return Quantizer(grid, site).to(denoiser.device)
        return Quantizer(with_rows(grid, (path, port), steps, only), site, clock).to(denoiser.device)

    def layer(path: str, role: str, *ports: str) -> QuantLayer:
        return QuantLayer(model.get_submodule(path), role, *(quantizer(path, role, port) for port in ports))

    layers = {path: layer(path, role, *PORTS["layer"]) for path, role in denoiser.sites().items()}
    tables = {path: layer(path, role, "weight") for path, role in embeddings_in(model).items()}
    layers, tables = put_in(model, layers), put_in(model, tables)
    former = {path: one.layer for path, one in (layers | tables).items()}
    for path in denoiser.products():
        ports = {port: quantizer(path, "product", port) for port in PORTS["product"]}
        if any(port is None for port in ports.values()):
            continue
        attention = model.get_submodule(path)
        products[path] = QuantProduct(**ports)  # type: ignore[arg-type]
        attention.product = products[path]  # type: ignore[assignment]
        rebind(attention, products[path], path)

    hook = read_clock(denoiser, clock) if clock is not None else None
    try:
        yield Inserted(denoiser, plan, layers, products, splits, clock, tables)
    finally:
        if hook is not None:
            hook.remove()
        put_back(model, former, products)
        unsplit()


def with_rows(grid: Grid, place: Place, steps: StepTable | None, only: Container[Place] | None) -> Grid:
    """The grid of an activation, with a range for every row of the table where that is wanted."""
    wanted = steps is not None and (only is None or place in only)
    return replace(grid, granularity="step") if wanted else grid


def put_in(model: nn.Module, layers: Mapping[str, QuantLayer]) -> dict[str, QuantLayer]:
    """Those that have a quantizer, in the places of what they stand in for."""
    quantized = {
        path: layer for path, layer in layers.items() if layer.weight_quantizer or layer.input_quantizer
    }
    for path, layer in quantized.items():
        model.set_submodule(path, layer)
    return quantized


def put_back(model: nn.Module, former: Mapping[str, nn.Module], products: Iterable[str]) -> None:
    """The float layers, and the products of attentions whose product was exchanged."""
    for path in products:
        attention = model.get_submodule(path)
        give_back(attention)
        del attention.product
    for path, layer in former.items():
        model.set_submodule(path, layer)


def read_clock(denoiser: Denoiser, clock: Clock) -> Any:
    """Let the clock see the t of every call before the model does."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = denoiser.bind(args, kwargs)
        clock.read(torch.as_tensor(arguments[denoiser.family.t]), len(arguments[denoiser.family.x]))

    return denoiser.model.register_forward_pre_hook(hook, with_kwargs=True)
