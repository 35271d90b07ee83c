"""How much each site hurts when it alone is rounded: one site at a time, by whatever measures the model then."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.core.affine import scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.core.similarity import ssim
from stepquant.core.slices import Slices
from stepquant.fit.lines import Lines
from stepquant.fit.ranges import counts_of, in_integers, set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.hooks import read_by
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress
from stepquant.quant.insert import Inserted, Place, insert
from stepquant.quant.plan import Plan
from stepquant.quant.quantizer import Quantizer

NORM = 2.4  # of the error that ranges minimise
CANDIDATES = 20  # of the range of a weight: a finer search changes losses by less than other records would

Measure = Callable[[], float]  # the loss of the model as it is now


@dataclass(frozen=True)
class Question:
    """A site, the bits that it may have, and what tells its loss."""

    place: Place
    bits: tuple[int, ...]
    measure: Measure


def losses_alone(
    denoiser: Denoiser,
    plan: Plan,
    questions: Sequence[Question],
    data: CalibSet,
    lines: Lines,
    progress: Progress,
    keep: Callable[[Inserted], object],
) -> dict[tuple[Place, int], float]:
    """The loss of each site at each of its bits while all others are float; what `lines` holds is not measured again.

    `keep` says what else stays as it is in a network.
    """
    decided, finished = plan.resolve(denoiser), lines.read()
    work = [(bits, one) for one in questions for bits in one.bits]
    known = {(one.place, bits): finished.get(key_of(one.place, bits)) for bits, one in work}
    work = [(bits, one) for bits, one in work if known[one.place, bits] is None]
    tracked = iter(progress.track(work, "one site at a time", len(work)))
    for width in sorted({bits for bits, _ in work}):
        todo = [one for bits, one in work if bits == width]
        grids: dict[Place, Grid] = {
            one.place: replace(some, bits=width)
            for one in todo
            if (some := decided[one.place].grid)  # type: ignore[index]
        }
        with insert(denoiser, plan.with_grids(grids, f"{width} bits")) as network:
            keep(network)
            set_ranges(network, data, CANDIDATES)
            by_place: dict[Place, Quantizer] = {(q.site.path, q.site.port): q for q in network.quantizers()}
            for one in todo:
                next(tracked)
                with enabled(by_place[one.place]):
                    known[one.place, width] = found = {"loss": one.measure()}
                lines.append(key_of(one.place, width), found)
    for _ in tracked:  # so that the progress bar reaches its end
        pass
    return {key: float(found["loss"]) for key, found in known.items() if found is not None}


def sizes_of(denoiser: Denoiser, places: Collection[Place], data: CalibSet) -> dict[Place, int]:
    """How many numbers there are: in a weight, or in what a layer reads in a call of one record."""
    layers = {place: denoiser.model.get_submodule(place[0]) for place in places}
    sizes = {place: layer.weight.numel() for place, layer in layers.items() if place[1] == "weight"}  # type: ignore[union-attr, operator]
    read = {place: layer for place, layer in layers.items() if place[1] == "input"}

    def counting(place: Place) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sizes[place] = sizes.get(place, 0) + read_by(args, kwargs).numel()

        return hook

    hooks = [
        layer.register_forward_pre_hook(counting(place), with_kwargs=True) for place, layer in read.items()
    ]
    try:
        with torch.no_grad():
            if read:
                denoiser.predict(data.take([0]).arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {place: sizes.get(place, 0) for place in places}


def key_of(place: Place, bits: int) -> str:
    return f"{place[0]}:{place[1]}@{bits}"


def set_ranges(network: Inserted, data: CalibSet, candidates: int = 100) -> None:
    """Ranges of least error from the float model's own tensors: the first batch decides those of activations."""
    set_weight_ranges(network, partial(lp_search, p=NORM, candidates=candidates))

    def observe(quantizer: Quantizer, values: Slices) -> None:
        ends = lp_search_binned(values, quantizer.grid, p=NORM)
        quantizer.set_range(*scale_and_zero(*ends, quantizer.grid))
        if quantizer.grid.codebook:
            quantizer.set_codebook(counts_of(quantizer, values))

    inputs = network.ranged()
    network.switch(weights=False, inputs=False)
    for quantizer in inputs:
        quantizer.observer = observe
    with torch.no_grad():
        seen = in_integers(data, network.plan.float_steps) or data
        network.denoiser.predict(seen.take(range(len(seen))).arguments)
    for quantizer in inputs:
        quantizer.observer = None


@contextmanager
def enabled(quantizer: Quantizer) -> Iterator[None]:
    """Enables this quantizer alone."""
    quantizer.enabled = True
    try:
        yield
    finally:
        quantizer.enabled = False


class Noise:
    """The squared relative error of the prediction on recorded states: one over the ratio of signal to noise."""

    def __init__(self, denoiser: Denoiser, data: CalibSet) -> None:
        self.denoiser, self.arguments = denoiser, data.take(range(len(data))).arguments
        self.target = self.predict()

    def predict(self) -> Tensor:
        with torch.no_grad():
            return self.denoiser.predict(self.arguments).float().flatten(1)

    def __call__(self) -> float:
        error = (self.predict() - self.target).square().sum(1)
        return float((error / self.target.square().sum(1).clamp(min=1e-30)).mean())


class Structure:
    """What the structure of generated pictures lacks to that of the float model's: 1 - SSIM."""

    def __init__(self, pipeline: Any, seeds: Sequence[int], sampling: Sampling) -> None:
        self.pipeline, self.seeds, self.sampling = pipeline, seeds, sampling
        self.pictures = self.draw()

    @property
    def tells(self) -> bool:
        """Whether these are pictures, large enough for the window of SSIM, with anything on them."""
        flat = bool(self.pictures.flatten(1).std(1).max() == 0)
        return not flat and self.pictures.ndim == 4 and ssim(self.pictures, self.pictures) is not None

    def draw(self) -> Tensor:
        """Frames of a video as pictures of their own."""
        with torch.no_grad():
            made = run(self.pipeline, self.seeds, self.sampling)
        return made.flatten(0, -4) if made.ndim > 4 else made

    def __call__(self) -> float:
        found = ssim(self.pictures, self.draw())
        assert found is not None
        return max(1 - float(found.mean()), 0.0)
