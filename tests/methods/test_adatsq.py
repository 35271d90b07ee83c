from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline

from stepquant import methods
from stepquant.artifact import Artifact, LayerSpec
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.grid import Grid
from stepquant.core.steps import StepTable
from stepquant.errors import ArtifactError
from stepquant.fit import compensate
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.quantizer import Clock, Quantizer, Site
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import lower
from tests.contracts.smallest import digest

pytestmark = pytest.mark.usefixtures("coarse")
FEW = {"samples": 16, "states": 2, "batch": 8}
NARROW = "transformer_blocks.1.ff.net.2"


@pytest.fixture
def of_classes(class_pipeline: DiTPipeline, source: Source) -> Source:
    return replace(source, pipeline=class_pipeline, sampling=Sampling(3), batch=2)


def run(source: Source, plan: str = "w4a4", **settings: Any) -> Artifact:
    return methods.build("adatsq", FEW | settings)(Denoiser.of(source.pipeline), scheme(plan), source)


def test_bits_differ_by_step_and_are_on_average_those_of_the_scheme(of_classes: Source) -> None:
    artifact, model = run(of_classes), of_classes.pipeline.transformer
    decided = scheme("w4a4").resolve(Denoiser(model))
    uneven = {path for path, spec in artifact.layers.items() if spec.input_bits}
    assert len(uneven) > 3
    spent, had = 0.0, 0.0
    for path, spec in artifact.layers.items():
        if spec.input is None:
            continue
        macs = model.get_submodule(path).weight.numel()  # of as many tokens everywhere, but for the head
        bits = (
            artifact.tensors[f"{path}.input_bits"].float()
            if path in uneven
            else torch.tensor(float(spec.input.bits)).expand(3)
        )
        assert set(bits.tolist()) <= {3, 4, 5, 6, 8}
        assert spec.input.bits == bits.max()
        spent += float(bits.mean()) * macs
        had += decided[path, "input"].grid.bits * macs
    assert had * 0.9 < spent <= had * 1.001

    lowered = lower(copy.deepcopy(model), artifact, torch.float32)
    for path in uneven:
        codes = lowered.get_submodule(path).input_codes()
        assert [code.high for code in codes] == [
            2**b - 1 for b in artifact.tensors[f"{path}.input_bits"].tolist()
        ]
    for block in (0, 1):
        q, k, v = (
            artifact.layers[f"transformer_blocks.{block}.attn1.to_{name}"].input_bits for name in "qkv"
        )
        assert q == k == v, "who reads one tensor reads the same integers"
    (records,) = of_classes.record(every(1, [0])).batches(2)
    lowered(**records.arguments)
    assert lowered.get_submodule(NARROW).integer


@pytest.mark.parametrize("text", ["uint4/tensor", "int4/tensor"])
def test_a_step_of_fewer_bits_has_fewer_numbers_in_simulation(text: str) -> None:
    table = StepTable.of(torch.tensor([30.0, 20.0, 10.0]))
    clock = Clock(table)
    quantizer = Quantizer(replace(Grid.parse(text), granularity="step"), Site("l", "q", "input"), clock)
    quantizer.set_bits([3, 8, 5])
    for row in range(3):
        quantizer.set_range(torch.tensor(0.5), torch.tensor(0.0), row)
    quantizer.enabled = True
    clock.read(torch.tensor([20.0, 30.0, 10.0]), 3)
    x = torch.linspace(-200, 200, 2001).expand(3, -1)
    found = quantizer(x)
    for row, bits in enumerate((8, 3, 5)):
        grid = replace(Grid.parse(text), bits=bits)
        want = (x[row] / 0.5).round().clamp(grid.qmin, grid.qmax) * 0.5
        torch.testing.assert_close(found[row], want)
        assert len(found[row].unique()) == grid.levels


def test_weights_are_rounded_by_weighed_records_and_fields_change_what_they_say(of_classes: Source) -> None:
    plain, weighed = run(of_classes, bits=False, fisher=False), run(of_classes, bits=False)
    assert not any(spec.input_bits for spec in plain.layers.values())
    names = [name for name in plain.tensors if name.endswith(".weight")]
    assert any(not torch.equal(plain.tensors[name], weighed.tensors[name]) for name in names)
    assert all(
        torch.equal(plain.tensors[f"{name}_scale"], weighed.tensors[f"{name}_scale"]) for name in names
    ), "the same ranges, rounded otherwise"
    wide = run(of_classes, "w4a8")
    assert not any(spec.input_bits for spec in wide.layers.values()), "8 bits leave nothing to share out"


def test_a_second_run_takes_roundings_from_the_journal(
    of_classes: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(of_classes, bits=False)
    monkeypatch.setattr(compensate, "round_compensated", None)
    assert digest(run(of_classes, bits=False)) == digest(first)


@pytest.mark.parametrize("plan", ["w4a16", "w8a8-dynamic"])
def test_schemes_without_ranges_take_the_weights_alone(plan: str, of_classes: Source) -> None:
    artifact = run(of_classes, plan)
    assert artifact.steps is None
    assert not any(spec.input_bits for spec in artifact.layers.values())
    lower(copy.deepcopy(of_classes.pipeline.transformer), artifact)


def test_what_cannot_be_is_refused() -> None:
    spec = LayerSpec(Grid(4, granularity="channel"), Grid.parse("uint8/step"), input_bits=True)
    assert LayerSpec.from_json(spec.to_json()) == spec
    for grid in (Grid.parse("uint8/tensor"), None):
        with pytest.raises(ArtifactError, match="without ranges by step"):
            LayerSpec.from_json(replace(spec, input=grid).to_json())
