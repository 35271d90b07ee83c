"""Every denoiser class of diffusers, declared or not: quantized, saved, loaded in a fresh process, the same prediction."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from stepquant import hub
from stepquant.calib.calibset import CalibSet
from stepquant.calib.rows import Rows, shard_of
from stepquant.core.digest import tensors_digest
from stepquant.core.ranges import minmax
from stepquant.errors import CalibrationError
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.models.observe import observed
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.schemes import scheme
from tests.models import every
from tests.models.tiny import CASES

Arguments = dict[str, Any]
ROOT = Path(__file__).parents[2]
CALL = "call.safetensors"
MOST_ERROR = 0.25  # of a prediction of random weights, in 8 bits
NOT_RECORDED = {
    "WanAnimate2Transformer3DModel": "'kv_cache'"
}  # each with the argument that no record can hold


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

    error: float
    digest: str


def calibrated(denoiser: Denoiser, arguments: Arguments, folder: Path) -> CalibSet:
    """One call of two samples, as it is recorded."""
    rows = Rows(denoiser, [0, 1])
    rows.keep(arguments, [0, 1], 0, 0, "")
    columns, form = shard_of([("call", rows)])
    save_file(columns, folder / CALL, metadata=form)
    return recorded(denoiser, folder)


def recorded(denoiser: Denoiser, folder: Path) -> CalibSet:
    return CalibSet((folder / CALL,), ((0, 0), (0, 1)), denoiser.family.x, denoiser.family.t, {})


def predicted(model: nn.Module, folder: Path) -> Tensor:
    """What a model predicts for the recorded call."""
    denoiser = Denoiser(model)
    with torch.no_grad():
        return denoiser.predict(recorded(denoiser, folder).take([0, 1]).arguments)


def make(name: str, folder: Path) -> Made:
    folder.mkdir()
    model, arguments = BUILDERS[name]()
    denoiser = observed(Denoiser(model), arguments)
    data = calibrated(denoiser, arguments, folder)
    exact = predicted(model, folder)
    assert exact.isfinite().all()
    assert exact.any(), "a prediction of zeros would hide what quantizing does"
    with torch.no_grad(), insert(denoiser, scheme("w8a8")) as network:
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax)
        artifact = freeze(network)
    hub.attach(model, artifact)
    found = predicted(model, folder)
    model.save_pretrained(folder / "model")
    return Made(float((found - exact).norm() / exact.norm()), tensors_digest({"": found}))


def predict_again(folder: str, threads: int) -> None:
    """In a process of its own: the digest of every prediction, as JSON."""
    torch.set_num_threads(threads)
    found = {}
    for place in sorted(Path(folder).iterdir()):
        if (place / "model").exists():
            model = getattr(diffusers, place.name).from_pretrained(place / "model")
            found[place.name] = tensors_digest({"": predicted(model, place)})
    print(json.dumps(found))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("every")


@pytest.fixture(scope="module")
def made(place: Path) -> Mapping[str, Made | Exception]:
    found: dict[str, Made | Exception] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # traced only to say so
        for name in BUILDERS:
            try:
                found[name] = make(name, place / name)
            except Exception as error:
                found[name] = error
    return found


@pytest.fixture(scope="module")
def again(made: Mapping[str, Made | Exception], place: Path) -> Mapping[str, str]:
    words = f"from {__name__} import predict_again; predict_again({str(place)!r}, {torch.get_num_threads()})"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", words], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    digests: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return digests


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - set(NOT_RECORDED)))
def test_a_class_runs_in_integers_and_after_loading_gives_the_same(
    name: str, made: Mapping[str, Made | Exception], again: Mapping[str, str]
) -> None:
    found = made[name]
    if isinstance(found, Exception):
        raise found
    assert found.error < MOST_ERROR
    assert again[name] == found.digest


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_what_cannot_be_recorded_says_what(name: str, made: Mapping[str, Made | Exception]) -> None:
    assert isinstance(made[name], CalibrationError)
    assert NOT_RECORDED[name] in str(made[name])


def test_the_count_stands_in_the_readme(made: Mapping[str, Made | Exception]) -> None:
    count = f"{sum(isinstance(one, Made) for one in made.values())} of {len(made) + len(every.NOT_TINY)}"
    print(f"denoiser classes of diffusers {diffusers.__version__}: {count}")
    assert count in (ROOT / "README.md").read_text(encoding="utf-8")
