"""The layers between t and what every block adds for it: a finite set of inputs, so that they are fitted apart, or tabled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.errors import MethodError
from stepquant.fit.learner import Sample, Schedule
from stepquant.fit.reconstruct import Report, reconstruct
from stepquant.fit.shape import PROBES, shape_of
from stepquant.fit.streams import Piece, Table
from stepquant.models.blocks.structure import Structure, structure
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import Inserted
from stepquant.quant.quantizer import Clock

ROLES = ("time", "modulate")


class TimeBlock(nn.Module):
    """From t to what each residual block adds, through the layers that the model has at present."""

    def __init__(self, model: nn.Module, chains: Structure, clock: Clock | None = None) -> None:
        super().__init__()
        assert chains.time is not None, "see `time_chains`"
        self.projection, self.embedding = (model.get_submodule(path) for path in chains.time)
        timed = [residual.path for residual in chains.residuals if residual.timed]
        self.layers = nn.ModuleList(model.get_submodule(f"{path}.time_emb_proj") for path in timed)
        self.clock = clock

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        if self.clock is not None:
            self.clock.read(t, len(t))
        activated = F.silu(self.embedding(self.projection(t.float())))
        return tuple(layer(activated) for layer in self.layers)


def time_chains(denoiser: Denoiser) -> Structure:
    """The structure of a float model whose every layer behind t is declared; others are an error."""
    chains = structure(denoiser.model)
    declared = set(chains.time_layers())
    behind = {path for path, role in denoiser.sites().items() if role in ROLES}
    if not declared or behind - declared:
        raise MethodError(
            "this model has no time embedding of the declared kind",
            where=type(denoiser.model).__name__,
            got=f"undeclared: {', '.join(sorted(behind - declared)[:3])}" if behind else "no such layers",
            fix="choose a method that does not treat the time embedding apart, or --set time=table",
        )
    return chains


def has_time_block(denoiser: Denoiser) -> bool:
    try:
        time_chains(denoiser)
    except MethodError:
        return False
    return True


def adds_to_time(denoiser: Denoiser) -> bool:
    """Whether something else enters what the time embedding becomes, so that no row over t can stand in for it."""
    others = ("class_embedding", "add_embedding", "time_embed_act")
    return any(getattr(denoiser.model, name, None) is not None for name in others)


def reconstruct_time(
    network: Inserted, chains: Structure, times: Tensor, schedule: Schedule, seed: int
) -> Report:
    """Fit the time block alone, on every t of the sampler."""
    block, device = TimeBlock(network.denoiser.model, chains, network.clock), network.denoiser.device
    times = times.to(device)
    network.switch(weights=False, inputs=False)
    with torch.no_grad():
        targets = block(times)
    few, many = PROBES
    arguments = shape_of({"t": times[:few]}, {"t": times[:many]})
    results = shape_of(tuple(one[:few] for one in targets), tuple(one[:many] for one in targets))
    piece = Piece("time block", block, arguments, results, tuple(chains.time_layers()))
    inputs, every = Table(arguments, (times,), device), torch.arange(len(times))
    network.switch(weights=True, inputs=False)
    sample = Sample(inputs, inputs, Table(results, tuple(targets), device), every, every)
    with records_at(network.clock, times):
        return reconstruct(network, piece, sample, schedule, seed)


@contextmanager
def records_at(clock: Clock | None, times: Tensor) -> Iterator[None]:
    """While open, the records are these values of t."""
    if clock is None:
        yield
        return
    former, clock.times = clock.times, times
    try:
        yield
    finally:
        clock.times = former


def time_table(denoiser: Denoiser, chains: Structure, times: Tensor) -> Tensor:
    """What every residual block adds for each t, side by side: (times, channels), exact."""
    with torch.no_grad():
        return torch.cat(TimeBlock(denoiser.model, chains)(times.to(denoiser.device)), dim=1)
