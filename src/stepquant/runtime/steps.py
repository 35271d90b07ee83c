"""What changes from step to step: ranges of activations, rows of the time embedding, corrections of the prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from stepquant.artifact import StepSpec, bounds_of
from stepquant.core.bounds import check_values
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.errors import RuntimeSupportError
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.family import Family
from stepquant.models.noise import adds_noise, answer_of_clean, eta_of, left_of_noise, takes_eta
from stepquant.models.samples import samples_at
from stepquant.models.tables import StepTables
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.stored import Prepared, Stored, Versions
from stepquant.runtime.turns import Turns

Prediction = Tensor | list[Tensor]  # of all samples together, or of each


@dataclass(frozen=True, eq=False)
class PreparedSteps(Prepared):
    """What an artifact knows of each t."""

    times: StepTable
    table: Tensor | None  # what the time embedding becomes
    correction: StepCorrection | None


class StepTensors(Stored[PreparedSteps], StepTables):
    """The tables of an artifact as buffers, in the dtypes they have on disk whatever the model is cast to."""

    def __init__(self, spec: StepSpec, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.present: Tensor | None = None  # rows of the table, one for each sample of the running call
        self.register_buffer("bits", torch.zeros(spec.times, dtype=torch.int64, device=device))
        self.register_buffer("rows", torch.zeros(spec.times, dtype=torch.int32, device=device))
        if spec.table:
            self.register_buffer("table", torch.zeros(spec.times, spec.table, device=device))
        if spec.channels:
            for name in ("scale", "bias", "variance"):
                value = torch.zeros(spec.times, spec.channels, device=device)
                self.register_buffer(f"correction_{name}", value)

    def prepare(self, versions: Versions) -> PreparedSteps:
        found = {f"steps.{name}": value for name, value in self.named_buffers()}
        check_values(found, bounds_of({}, {}, self.spec), "the model's own tables")
        times = StepTable.from_bits(found["steps.bits"], found["steps.rows"])
        return PreparedSteps(versions, times, found.get("steps.table"), self.correction())

    def times(self) -> StepTable:
        return self.prepared().times

    def correction(self) -> StepCorrection | None:
        if not self.spec.channels:
            return None
        scale, bias, variance = (
            getattr(self, f"correction_{name}") for name in ("scale", "bias", "variance")
        )
        return StepCorrection(scale, bias, variance, self.spec.noise)

    def carry(self, scheduler: Any) -> Any:
        """`scheduler`, in place, with its noise changed as the correction says."""
        ready = self.prepared()
        correction = ready.correction
        if correction is None or correction.noise == "none":
            return scheduler
        return (absorb if correction.noise == "absorb" else sample)(scheduler, correction, ready.times)


class StepForward:
    """Takes the place of a model's forward: the present rows before it, the correction behind it.

    Samples that read different rows of the ranges run one after the other: an integer layer has one scale at a time.
    """

    def __init__(
        self, model: nn.Module, tensors: StepTensors, forward: Callable[..., Any] | None = None
    ) -> None:
        self.denoiser, self.tensors = Denoiser(model), tensors
        self.output = self.denoiser.output  # found before anything is compiled
        self.own = forward  # None: that of the model's class
        self.turns = Turns()
        tensors.prepared()  # before anything is compiled
        self.stepped = list(stepped_modules(model)) if tensors.spec.groups > 1 else []

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.call(*args, return_dict=return_dict, **kwargs)
        with self.turns:
            return self.call(*args, return_dict=return_dict, **kwargs)

    @property
    def forward(self) -> Callable[..., Any]:
        model = self.denoiser.model
        return self.own or type(model).forward.__get__(model)

    def call(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        denoiser, family, known = self.denoiser, self.denoiser.family, self.tensors.prepared()
        arguments = denoiser.bind(args, kwargs)
        samples = len(arguments[family.x])
        places = places_of(torch.as_tensor(arguments[family.t]), samples, known.times)
        if not self.stepped:
            out = self.forward_at(arguments, places)
        else:
            rows = known.times.rows[places]
            one = bool((rows == rows[:1]).all())
            first = int(rows[0]) if len(rows) else 0
            out = self.run(first, arguments, places) if one else self.by_row(arguments, places, rows)
        if known.correction is not None:
            out = corrected(out, known.correction, places, family.channels)
        return self.output(sample=out) if return_dict else (out,)

    def by_row(self, arguments: dict[str, Any], places: Tensor, rows: Tensor) -> Prediction:
        """The predictions of a batch whose samples read different rows, in its order."""
        family = self.denoiser.family
        return by_group(arguments, family, rows, lambda row, some, mine: self.run(row, some, places[mine]))

    def run(self, row: int, arguments: dict[str, Any], places: Tensor) -> Prediction:
        for module in self.stepped:
            module.select(row)
        return self.forward_at(arguments, places)

    def forward_at(self, arguments: dict[str, Any], places: Tensor) -> Prediction:
        """The model's own prediction, while tabled layers return the rows at these places."""
        tensors = self.tensors
        if tensors.spec.tabled:
            table = tensors.prepared().table
            assert table is not None, "what is tabled has a table"
            tensors.present = table[places.to(table.device)]
        try:
            out: Prediction = self.forward(**arguments, return_dict=False)[0]
        finally:
            tensors.present = None
        return out


def places_of(t: Tensor, samples: int, table: StepTable) -> Tensor:
    """The row of the tables that each sample reads."""
    places = table.places(t)
    if torch.compiler.is_compiling():
        torch._assert_async((places >= 0).all(), "this artifact has no entry for that t")
    elif (places < 0).any():
        unknown = t.reshape(-1)[places.argmin()].item()
        raise RuntimeSupportError(
            f"this artifact has no entry for t = {unknown:g}",
            expected=f"one of {len(table.times)} values from {table.times[0]:g} to {table.times[-1]:g}",
            fix="generate with the sampler and the number of steps that it was made for (stepquant inspect), or a divisor of it",
        )
    return places.expand(samples) if len(places) == 1 else places


def stepped_modules(model: nn.Module) -> Iterable[IntegerLayer | IntegerProduct]:
    return (m for m in model.modules() if isinstance(m, IntegerLayer | IntegerProduct) and m.stepped)


def by_group(
    arguments: Mapping[str, Any],
    family: Family,
    groups: Tensor,
    run: Callable[[int, dict[str, Any], Tensor], Prediction],
) -> Prediction:
    """The predictions of a batch in its order; `run` makes those of each group of samples, whose places it is told."""
    places = [(groups == group).nonzero().flatten() for group in groups.unique()]
    parts = [run(int(groups[mine[0]]), samples_at(arguments, mine, family), mine) for mine in places]
    order = torch.cat(places).argsort()
    joined = [part for part in parts if isinstance(part, Tensor)]
    if joined:
        return torch.cat(joined)[order.to(joined[0].device)]
    listed = [one for part in parts for one in part]
    return [listed[place] for place in order.tolist()]


def corrected(out: Prediction, correction: StepCorrection, places: Tensor, channels: int) -> Prediction:
    """What a model predicts, each sample with the row at its place; `channels` is their axis."""
    if isinstance(out, list):
        return [
            correction(one[None], place[None], channels)[0].to(one.dtype) for one, place in zip(out, places)
        ]
    return correction(out, places, channels).to(out.dtype)


def absorb(scheduler: Any, correction: StepCorrection, table: StepTable) -> Any:
    """Make the sampler's noise smaller by the variance that the prediction brings into the state."""

    def error(t: Any) -> Tensor:
        return correction.variance[table.places(torch.as_tensor(t))].reshape(1, -1, 1, 1)

    if takes_eta(scheduler):
        scheduler.step = scaling(scheduler, error)
        return scheduler
    if not adds_noise(scheduler):
        scheduler.step = functools.partial(refuse, type(scheduler).__name__)
        return scheduler
    own = scheduler._get_variance

    def smaller(t: Any, *args: Any, **kwargs: Any) -> Tensor:
        before = scheduler.previous_timestep(t)
        kept = scheduler.alphas_cumprod[t]
        kept_before = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.one
        beta = 1 - kept / kept_before
        # How the mean of x_{t-1} answers to the prediction: Eq. 7 of arXiv:2006.11239 behind its Eq. 15.
        rate = kept_before.sqrt() * beta / (1 - kept) * answer_of_clean(scheduler, kept)
        return (own(t, *args, **kwargs) - rate**2 * error(t).to(kept.device)).clamp(min=0.0)

    scheduler._get_variance = smaller
    return scheduler


def scaling(scheduler: Any, error: Callable[[Any], Tensor]) -> Callable[..., Any]:
    """A step of DDIM whose own noise is smaller by the error of the prediction; without noise it is refused."""
    own = scheduler.step

    @functools.wraps(own)
    def step(model_output: Tensor, timestep: Any, *args: Any, eta: float = 0.0, **kwargs: Any) -> Any:
        eta = eta or eta_of(scheduler)
        if not eta:
            refuse(type(scheduler).__name__)
        drawn = kwargs.pop("generator", None)
        noise = kwargs.pop("variance_noise", None)
        if noise is None:
            noise = randn_tensor(model_output.shape, drawn, model_output.device, model_output.dtype)
        left = left_of_noise(scheduler, timestep, eta, error(timestep)).to(noise)
        return own(model_output, timestep, *args, eta=eta, variance_noise=left * noise, **kwargs)

    return step


def refuse(name: str, *_: Any, **__: Any) -> Any:
    raise RuntimeSupportError(
        "this sampler adds no noise that could absorb the variance of the quantization error",
        got=name,
        expected="the sampler that the artifact was made for, as --sampler ddpm, or eta=1 in a call of DDIM",
        fix="generate with it, or quantize again with --set variance=none",
    )


def sample(scheduler: Any, correction: StepCorrection, table: StepTable) -> Any:
    """Take noise of the variance that is left off every prediction before the sampler steps."""
    own = scheduler.step

    @functools.wraps(own)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = table.places(torch.as_tensor(timestep))
        spread = correction.variance[place].sqrt().reshape(1, -1, *[1] * (model_output.ndim - 2))
        noise = randn_tensor(
            model_output.shape, kwargs.get("generator"), model_output.device, model_output.dtype
        )
        return own(model_output - spread.to(model_output) * noise, timestep, sample, *args, **kwargs)

    scheduler.step = step
    return scheduler
