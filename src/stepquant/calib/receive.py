"""What the networks beside the denoiser receive while the float pipeline makes what calibrates it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from stepquant.calib.record import Source, trajectory_seed
from stepquant.errors import CalibrationError
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.hooks import listening
from stepquant.models.part import Part, Received, receiving
from stepquant.models.sampling import Enough


def receive(source: Source, parts: Sequence[Part], trajectories: int) -> dict[str, list[Received]]:
    """The calls of every part over so many trajectories of the source, by component.

    Where no part decodes, a trajectory ends when it reaches the denoiser.
    """
    found: dict[str, list[Received]] = {part.component: [] for part in parts}
    early = not any(hasattr(part.model, "decode") for part in parts)
    seeds = [trajectory_seed(source.seed, number) for number in range(trajectories)]
    batches = [seeds[start : start + source.batch] for start in range(0, len(seeds), source.batch)]
    with ExitStack() as stack, torch.no_grad():
        for part in parts:
            stack.enter_context(receiving(part.model, partial(keep, found[part.component])))
        if early:
            stack.enter_context(listening(Denoiser.of(source.pipeline), stop))
        for batch in source.progress.track(batches, "recording calls of other parts", len(batches)):
            try:
                run(source.pipeline, batch, source.sampling)
            except Enough:
                continue
    check_called(found)
    return found


def keep(calls: list[Received], call: Received) -> None:
    calls.append(call)


def stop(_: int, __: Mapping[str, Any]) -> None:
    raise Enough


def check_called(found: Mapping[str, Sequence[Received]]) -> None:
    for component, calls in found.items():
        if not calls:
            raise CalibrationError(
                f"the pipeline never called '{component}'",
                expected="calls that calibrate it",
                fix=f"ask for something that needs it (--prompts, --calls), or leave '{component}' out of --components",
            )
