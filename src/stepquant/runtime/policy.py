"""Steps in float: the same modules, whose integer layers multiply floats with dequantized weights for the time of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.core.policy import FloatSteps
from stepquant.errors import ArtifactError
from stepquant.models.denoiser import COMPONENTS, Denoiser
from stepquant.models.families.registry import family_of
from stepquant.runtime.blocks.install import bound
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.cast import FloatLayer
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.tabled import Tabled
from stepquant.runtime.steps import Prediction, by_group
from stepquant.runtime.turns import Turns


class PolicyForward:
    """Takes the place of a model's forward: at the steps that a policy names, its class runs in float, block by block.

    Nothing of that is kept: each layer dequantizes its weight when it is called, so that there is never a float copy of
    the model, and whatever moves, offloads or adapts the model has nothing more to think of.
    """

    def __init__(self, model: nn.Module, steps: FloatSteps, forward: Callable[..., Any] | None) -> None:
        self.denoiser, self.steps = Denoiser(model), steps
        self.own = forward  # None: that of the model's class
        self.turns = Turns()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which path is taken depends on the value of t
            return torch.compiler.disable(self.in_turn)(*args, **kwargs)
        return self.in_turn(*args, **kwargs)

    def in_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.turns:
            return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        family, arguments = self.denoiser.family, self.denoiser.bind(args, kwargs)
        chosen = self.steps(torch.as_tensor(arguments[family.t]), len(arguments[family.x]))
        if bool(chosen.all()) or not bool(chosen.any()):
            return self.run(bool(chosen[:1].any()), *args, **kwargs)

        def run(group: int, some: dict[str, Any], _: Tensor) -> Prediction:
            return self.run(bool(group), **some, return_dict=False)[0]  # type: ignore[no-any-return]

        out = by_group(arguments, family, chosen.long(), run)
        return self.denoiser.output(sample=out) if kwargs.get("return_dict", True) else (out,)

    def run(self, floats: bool, *args: Any, **kwargs: Any) -> Any:
        model = self.denoiser.model
        plain = type(model).forward.__get__(model)
        if not floats:
            return (self.own or plain)(*args, **kwargs)
        with in_floats(model):
            return plain(*args, **kwargs)


@contextmanager
def in_floats(model: nn.Module) -> Iterator[None]:
    """While open, all that multiplies integers multiplies floats, and nothing is cast on its way."""
    found: list[Any] = [m for m in model.modules() if isinstance(m, IntegerLayer | IntegerProduct | Tabled)]
    found += [one for one in map(bound, model.modules()) if isinstance(one, FloatLayer)]
    for one in found:
        one.in_floats = True
    try:
        yield
    finally:
        for one in found:
            one.in_floats = False


def check_policy(model: nn.Module, steps: FloatSteps, corrected: bool) -> None:
    """It is for this network, whose predictions are its own."""
    component = family_of(model).component
    if steps.scope in COMPONENTS and steps.scope != component:
        raise ArtifactError(
            "the policy of steps is for another component", got=steps.scope, expected=component
        )
    if corrected:
        raise ArtifactError(
            "predictions are corrected at every step, also at those that the policy runs in float",
            fix="quantize with a correction or with a policy",
        )
