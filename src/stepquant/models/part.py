"""Part: a network beside the denoiser, called in more ways than one, without a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stepquant.core.digest import tensors_digest, value_digest
from stepquant.errors import ModelError
from stepquant.models.denoiser import Denoiser, Seen, prediction_of
from stepquant.models.families.beside import beside
from stepquant.models.families.roles import OWN_WAY, computes_its_own_way
from stepquant.models.observe import fixed_products

ENTRIES = ("encode", "decode", "forward")  # what pipelines call of a network
NOT_CALLED = "was not called by the calls that calibrated it"
IDLE = "idle"  # the role of such a layer


@dataclass(frozen=True)
class Received:
    """One call of a part, as it came."""

    entry: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on(self, device: torch.device) -> Received:
        def there(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Received(self.entry, tree_map(there, self.args), tree_map(there, dict(self.kwargs)))

    def repeat(self, model: nn.Module) -> Any:
        """The same call of `model`."""
        return getattr(model, self.entry)(*self.args, **self.kwargs)


class Part(Denoiser):
    """What is called, built of and may be quantized of a network that denoises nothing."""

    def __init__(self, model: nn.Module, component: str, seen: Seen | None = None) -> None:
        self.model, self.seen = model, seen
        self.family, self.component = beside(model, component), component

    @classmethod
    def named(cls, pipeline: Any, component: str) -> Part:
        """The part of a pipeline by the name of its folder."""
        model = pipeline.components.get(component)
        if not isinstance(model, nn.Module):
            networks = [name for name, one in pipeline.components.items() if isinstance(one, nn.Module)]
            raise ModelError(
                f"{type(pipeline).__name__} has no network '{component}'",
                got=type(model).__name__ if model is not None else None,
                expected=", ".join(networks),
                fix="name those that are to be quantized: --components",
            )
        part = cls(model, component)
        if not part.sites():
            raise ModelError(
                f"'{component}' has no layer that could be quantized",
                got=type(model).__name__,
                expected="a network with linears or convolutions",
                fix=f"leave '{component}' out of --components",
            )
        return part

    def having(self, seen: Seen | None) -> Part:
        return Part(self.model, self.component, seen)

    def sites(self) -> dict[str, str]:
        """As of a denoiser; what the calls have not reached has a role of its own."""
        return super().sites() | dict({} if self.seen is None else self.seen.roles)

    def stays_float(self) -> dict[str, str]:
        strange = {
            path: OWN_WAY for path in self.sites() if computes_its_own_way(self.model.get_submodule(path))
        }
        return strange | super().stays_float()

    def digest(self) -> str:
        """SHA-256 of class, configuration and weights."""
        own: Any = self.model.config
        settings = dict(own.to_dict() if hasattr(own, "to_dict") else own)
        config = {k: v for k, v in settings.items() if not k.startswith("_")}
        kind = [type(self.model).__name__, sorted(config.items())]
        return value_digest(
            [json.loads(json.dumps(kind, default=str)), tensors_digest(self.model.state_dict())]
        )

    def predict(self, arguments: Mapping[str, Any]) -> Tensor:
        return prediction_of(arguments["call"].on(self.device).repeat(self.model))


@contextmanager
def receiving(model: nn.Module, keep: Callable[[Received], None]) -> Iterator[None]:
    """Hand every call of `model` from outside to `keep` before it happens."""
    depth = 0

    def call(entry: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if not depth:
            keep(Received(entry, args, kwargs))
        depth += 1
        try:
            return own(*args, **kwargs)
        finally:
            depth -= 1

    entries = [entry for entry in ENTRIES if callable(getattr(model, entry, None))]
    former = {entry: vars(model)[entry] for entry in entries if entry in vars(model)}
    for entry in entries:
        setattr(model, entry, partial(call, entry, getattr(model, entry)))
    try:
        yield
    finally:
        for entry in entries:
            delattr(model, entry)
        vars(model).update(former)


def seen_by(part: Part, calls: Sequence[Received]) -> Part:
    """The part with what none of these calls reaches: layers whose inputs have no range, and products without any."""
    reached: set[str] = set()
    kinds = [{"call": call} for call in {(one.entry, *sorted(one.kwargs)): one for one in calls}.values()]
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: reached.add(path))
        for path, module in part.model.named_modules()
    ]
    try:
        with torch.no_grad():
            for call in kinds:
                part.predict(call)
    finally:
        for handle in handles:
            handle.remove()
    idle, apart = (
        [path for path in paths if path not in reached] for paths in (part.sites(), part.products())
    )
    seen = part.having(Seen(dict.fromkeys(idle, IDLE), in_float=dict.fromkeys(apart, NOT_CALLED)))
    assert seen.seen is not None
    return part.having(replace(seen.seen, in_float={**seen.seen.in_float, **fixed_products(seen, kinds)}))
