"""Methods that round to nearest take back what that does to the means of outputs, where they are asked to."""

from __future__ import annotations

import pytest
import torch

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.models.denoiser import Denoiser, twin
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import lower

FEW = {"samples": 20, "trajectories": 4, "batch": 8, "iterations": 8}
# Of every kind one: without ranges, with one range, with ranges by step.
NAMES = ("convrot", "minmax", "ptq4dm", "tdq")


def few(name: str) -> dict[str, int]:
    known = methods.kind(name).model_fields
    return {key: value for key, value in FEW.items() if key in known}


@pytest.mark.parametrize(
    ("asked", "moves"), [("bias", (".bias",)), ("gain", (".bias", ".weight_scale"))], ids=["bias", "gain"]
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_for_moves_and_nothing_else_and_the_mean_comes_back(
    name: str, asked: str, moves: tuple[str, ...], source: Source
) -> None:
    plain, shifted = (
        methods.build(name, few(name) | more)(Denoiser.of(source.pipeline), scheme("w4a8"), source)
        for more in ({}, {asked: True})
    )
    moved = {key for key, value in plain.tensors.items() if not torch.equal(value, shifted.tensors[key])}
    assert {suffix for suffix in moves for key in moved if key.endswith(suffix)} == set(moves)
    assert all(key.endswith(moves) for key in moved)
    before, after = (mean_error(artifact, source) for artifact in (plain, shifted))
    assert after < 0.5 * before


def mean_error(artifact: Artifact, source: Source) -> float:
    """How far the mean prediction over all records lies from the float one, by channel."""
    denoiser = Denoiser.of(source.pipeline)
    quantized = lower(twin(denoiser.model), artifact)
    data = source.record(every(4, range(source.steps)))
    with torch.no_grad():
        errors = [
            quantized(**records.arguments)[0] - denoiser.model(**records.arguments)[0]
            for records in data.batches(8)
        ]
    return float(torch.cat(errors).mean((0, 2, 3)).abs().mean())
