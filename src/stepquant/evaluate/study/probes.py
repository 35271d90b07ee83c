"""How much every site hurts at every number of bits, estimated together from a few backward passes.

A small error d of a weight or an input moves the prediction by J d. For random v with independent entries of mean zero and
variance one, E (v . J d)^2 = |J d|^2 (Hutchinson 1990), and v . J d is the product of d with the gradient of v . prediction: one
backward pass tells it for all sites and bits. What `sensitivity` measures with a call for each of them is the same number,
beyond the second order of d, where there is no guidance. Guidance takes the difference of two predictions, in which most of what
layers err goes out, and what a table errs in the rows of two labels does not: so it is what the sampler reads that is probed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.calib.guided import State, read_by_sampler
from stepquant.core.affine import to_groups
from stepquant.errors import EvaluationError
from stepquant.evaluate.study.allocate import Sensitivity
from stepquant.evaluate.study.sites import StudiedSite, plan_with
from stepquant.fit.alone import set_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import read_by
from stepquant.progress import Progress
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from stepquant.quant.quantizer import Quantizer

CANDIDATES = (
    20  # of the range of a weight: a finer search changes an error by less than the probes' own spread
)


Options = Mapping[str, Mapping[int, Quantizer]]  # site key -> bits


def error_of(quantizer: Quantizer, values: Tensor) -> Tensor:
    """What a tensor loses."""
    rows = to_groups(values, quantizer.grid) if len(quantizer.scale) > 1 else values.reshape(1, -1)
    return quantizer.levels.values(rows).sub_(rows)


def estimate(
    denoiser: Denoiser,
    plan: Plan,
    sites: Sequence[StudiedSite],
    bits: Sequence[int],
    data: CalibSet,
    states: Sequence[State],
    progress: Progress,
    *,
    probes: int = 4,
    batch: int = 2,
    seed: int = 0,
) -> Sensitivity:
    """The squared relative error that each site makes alone of what the sampler reads; without guidance that is `noise`
    of a measured study."""
    options = options_of(denoiser, plan, sites, bits, data)
    told = Told(options)
    random = torch.Generator().manual_seed(seed)
    batches = [states[start : start + batch] for start in range(0, len(states), batch)]
    read = [data.take([record for state in some for record in state.records]).arguments for some in batches]
    work = list(zip(batches, read)) * probes
    with listening(denoiser.model, sites, told):
        for some, arguments in progress.track(work, "probing all sites at once", len(work)):
            target = read_by_sampler(denoiser.predict(arguments).float(), some)
            norms = target.detach().flatten(1).norm(dim=1).view(-1, *[1] * (target.ndim - 1))
            v = torch.randn(target.shape, generator=random).to(target.device) / norms
            (target * v).sum().backward()
            told.close()
    losses = {key: value / len(states) / probes for key, value in told.squares.items()}
    broken = [key for key, value in losses.items() if not math.isfinite(value)]
    if broken:
        raise EvaluationError(
            "a gradient is not finite",
            where=f"{broken[0][0]} at {broken[0][1]} bits",
            fix="measure the sites one by one: stepquant sensitivity, then allocate",
        )
    return Sensitivity(plan, tuple(sites), losses, tuple(sorted(bits)))


def options_of(
    denoiser: Denoiser, plan: Plan, sites: Sequence[StudiedSite], bits: Sequence[int], data: CalibSet
) -> Options:
    """Every grid of every site, over the range of least error."""
    found: dict[str, dict[int, Quantizer]] = {site.key: {} for site in sites}
    for width in bits:
        narrow = plan_with(f"{width} bits", plan, {site.key: width for site in sites}, sites)
        with insert(denoiser, narrow) as network:
            set_ranges(network, data, CANDIDATES)
            for quantizer in network.quantizers():
                if str(quantizer.site) in found:
                    found[str(quantizer.site)][width] = quantizer
    return found


class Told:
    """The products of errors with gradients: summed over the uses of a site in one pass, then squared."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.sums: dict[tuple[str, int], float] = {}
        self.squares = {(key, width): 0.0 for key, widths in options.items() for width in widths}

    def add(self, key: str, values: Tensor, gradient: Tensor) -> None:
        values, gradient = values.detach().float(), gradient.float()
        for width, quantizer in self.options[key].items():
            error = error_of(quantizer, values)
            product = float((error * gradient.reshape(error.shape)).sum())
            self.sums[key, width] = self.sums.get((key, width), 0.0) + product

    def close(self) -> None:
        for key, value in self.sums.items():
            self.squares[key] += value**2
        self.sums = {}


@contextmanager
def listening(model: nn.Module, sites: Sequence[StudiedSite], told: Told) -> Iterator[None]:
    """Gradients go to `told` and are dropped; no parameter keeps one, and the model is as it was at the end."""
    former = {weight: weight.requires_grad for weight in model.parameters()}
    model.requires_grad_(False)
    hooks: list[Any] = []
    for site in sites:
        layer: Any = model.get_submodule(site.path)
        if site.port == "weight":
            layer.weight.requires_grad_(True)
            hooks.append(layer.weight.register_post_accumulate_grad_hook(weight_hook(site.key, told)))
        else:
            hooks.append(layer.register_forward_pre_hook(input_hook(site.key, told), with_kwargs=True))
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, wanted in former.items():
            weight.requires_grad_(wanted)
            weight.grad = None


def weight_hook(key: str, told: Told) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        told.add(key, weight, weight.grad)
        weight.grad = None

    return hook


def input_hook(key: str, told: Told) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = read_by(args, kwargs)
        alone = (
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        )  # what this layer reads, no other
        alone.register_hook(partial(told.add, key, x))
        return ((alone, *args[1:]), kwargs) if args else ((), {**kwargs, "input": alone})

    return hook
