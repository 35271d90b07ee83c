"""Every denoiser class of diffusers, declared or not: quantized, saved, loaded in a fresh process, the same prediction."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stepquant import hub
from stepquant.calib.calibset import CalibSet
from stepquant.calib.rows import Rows, shard_of
from stepquant.core.digest import tensors_digest
from stepquant.core.ranges import minmax
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.registry import is_declared
from stepquant.models.observe import observed
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.schemes import scheme
from tests.models import every
from tests.models.tiny import CASES

Arguments = dict[str, Any]
MOST_ERROR = 0.25  # of a prediction of random weights, in 8 bits


def tiny_of(name: str) -> tuple[nn.Module, Arguments]:
    model, arguments, *_ = CASES[name]()
    return model.eval(), arguments


def declared_once() -> dict[str, Callable[[], tuple[nn.Module, Arguments]]]:
    """A tiny model of each class that the families' contract builds."""
    found: dict[str, Callable[[], tuple[nn.Module, Arguments]]] = {}
    for name in CASES:
        found.setdefault(type(tiny_of(name)[0]).__name__, partial(tiny_of, name))
    return found


BUILDERS = {**declared_once(), **every.BUILDERS}


@dataclass(frozen=True)
class Made:
    """A class that went all the way in this process: how far off it is, and the digest of what it predicts."""

    declared: bool
    error: float
    digest: str


def calibrated(denoiser: Denoiser, arguments: Arguments, folder: Path) -> CalibSet:
    """One call of two samples as it is recorded."""
    rows = Rows(denoiser, [0, 1])
    rows.keep(arguments, [0, 1], 0, 0, "")
    columns, values = shard_of([("call", rows)])
    save_file(columns, folder / "call.safetensors", metadata=values)
    return CalibSet(
        (folder / "call.safetensors",), ((0, 0), (0, 1)), denoiser.family.x, denoiser.family.t, {}
    )


def make(name: str, folder: Path) -> Made:
    folder.mkdir()
    model, arguments = BUILDERS[name]()
    denoiser = observed(Denoiser(model), arguments)
    with torch.no_grad():
        exact = denoiser.predict(arguments)
        data = calibrated(denoiser, arguments, folder)
        with insert(denoiser, scheme("w8a8")) as network:
            set_weight_ranges(network, minmax)
            set_input_ranges(network, data, minmax)
            artifact = freeze(network)
        hub.attach(model, artifact)
        found = Denoiser(model).predict(arguments)
    model.save_pretrained(folder / "model")
    torch.save(arguments, folder / "arguments.pt")
    error = float((found - exact).norm() / exact.norm())
    return Made(is_declared(model), error, tensors_digest({"": found}))


def predict_again(folder: str) -> None:
    """In a process of its own: the digest of every prediction, as JSON."""
    found = {}
    for place in sorted(Path(folder).iterdir()):
        model = getattr(diffusers, place.name).from_pretrained(place / "model")
        with torch.no_grad():
            out = Denoiser(model).predict(torch.load(place / "arguments.pt", weights_only=True))
        found[place.name] = tensors_digest({"": out})
    print(json.dumps(found))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Made | Exception]:
    folder = tmp_path_factory.mktemp("every")
    found: dict[str, Made | Exception] = {}
    for name in BUILDERS:
        try:
            found[name] = make(name, folder / name)
        except Exception as error:
            found[name] = error
    return found


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_class_runs_in_integers(name: str, made: Mapping[str, Made | Exception]) -> None:
    found = made[name]
    if isinstance(found, Exception):
        raise found
    assert found.error < MOST_ERROR
