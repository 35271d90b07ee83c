"""Steps in float: against the network whose layers were made float for good, and against the one that has no policy."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from stepquant import hub
from stepquant.artifact import Artifact
from stepquant.core.policy import FloatSteps, StepPolicy
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.errors import ArtifactError, PlanError
from stepquant.hub.exports import gguf, onnx
from stepquant.hub.exports.at_rest import at_rest
from stepquant.hub.of_transformers import TransformersQuantizer
from stepquant.models.denoiser import prediction_of
from stepquant.quant.schemes import scheme
from stepquant.runtime.coverage import coverage
from stepquant.runtime.dequantize import dequantize
from stepquant.runtime.lower import lower
from tests.conftest import make_unet
from tests.models.tiny import CASES
from tests.runtime.synthetic import noise, quantized, relative

TIMES = torch.tensor([900, 600, 300, 0])
EDGES = (900, 0)
STEPS = FloatSteps.of(StepPolicy(1, 1), "unet", TIMES)


class Case:
    """A network in integers without a policy, with one, and made float for good."""

    def __init__(self, name: str, steps: FloatSteps) -> None:
        torch.manual_seed(0)
        if name == "unet":
            model, self.arguments = make_unet(), {"sample": noise(2, 3, 8, 8)}
            self.x, self.t = "sample", "timestep"
        else:
            model, self.arguments, _ = CASES[name]()
            self.x, self.t = "hidden_states", "timestep"
        self.model: Any = model.eval()
        self.artifact = self.frozen(model)
        self.whole = lower(copy.deepcopy(model), self.artifact)
        self.mixed = lower(copy.deepcopy(model), replace(self.artifact, policy=steps))
        self.floats = dequantize(lower(copy.deepcopy(model), self.artifact))

    def frozen(self, model: Any) -> Artifact:
        return quantized(model, scheme("w8a8"), lambda t: self.call(model, t))[0]

    @torch.no_grad()
    def call(self, model: Any, t: Any, **changes: Any) -> Tensor:
        like = self.arguments.get(self.t, torch.tensor(0))
        given = torch.full_like(torch.as_tensor(like), t) if isinstance(t, int) else t
        return prediction_of(model(**self.arguments | {self.t: given} | changes, return_dict=False))


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("unet", STEPS)


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_edges_are_those_of_float_layers_and_the_middle_is_untouched(name: str, case: Case) -> None:
    one = case if name == "unet" else Case(name, replace(STEPS, scope="transformer"))
    for t in EDGES:
        for _ in range(3):  # as ever, recorded, replayed
            assert relative(one.call(one.mixed, t), one.call(one.floats, t)) < 1e-5
        assert relative(one.call(one.whole, t), one.call(one.floats, t)) > 1e-3
    for t in (600, 300, 600, 600):
        assert torch.equal(one.call(one.mixed, t), one.call(one.whole, t))


def test_the_time_of_samples_may_differ(case: Case) -> None:
    for several in (torch.tensor([900, 600]), torch.tensor([300, 0])):
        got = case.call(case.mixed, several)
        for place, t in enumerate(several.tolist()):
            alone = {case.x: case.arguments[case.x][place : place + 1]}
            assert torch.equal(got[place : place + 1], case.call(case.mixed, t, **alone))
    named = case.mixed(case.arguments[case.x], torch.tensor([900, 600]))
    assert torch.equal(named.sample, case.call(case.mixed, torch.tensor([900, 600])))


def test_what_happens_in_between_is_seen(case: Case) -> None:
    """Other weights between two calls, a hook, and gradients: nothing is kept of a step in float."""
    model = copy.deepcopy(case.mixed)
    seen: list[torch.dtype] = []
    handle = model.conv_out.register_forward_hook(lambda _, given, out: seen.append(given[0].dtype))
    assert relative(case.call(model, 0), case.call(case.floats, 0)) < 1e-5
    handle.remove()
    assert seen == [torch.float32]
    model.conv_out.weight_scale.mul_(2)
    model.conv_out.bias.zero_()
    floats = copy.deepcopy(case.floats)
    floats.conv_out.weight.data.mul_(2)
    floats.conv_out.bias.data.zero_()
    assert relative(case.call(model, 0), case.call(floats, 0)) < 1e-5
    x = case.arguments[case.x].clone().requires_grad_()
    (model(x, 0).sample ** 2).sum().backward()
    y = case.arguments[case.x].clone().requires_grad_()
    (floats(y, 0).sample ** 2).sum().backward()
    assert relative(x.grad, y.grad) < 1e-4


def test_offloaded_weights_come_for_each_layer(case: Case) -> None:
    offloaded = accelerate.cpu_offload(copy.deepcopy(case.mixed), "cpu", offload_buffers=True)
    assert next(offloaded.parameters()).is_meta
    for t in (0, 600):
        assert torch.equal(case.call(offloaded, t), case.call(case.mixed, t))


def test_a_saved_network_is_loaded_by_its_class(case: Case, tmp_path: Path) -> None:
    model = copy.deepcopy(case.model)
    hub.attach(model, replace(case.artifact, policy=STEPS))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for t in TIMES.tolist():
        assert torch.equal(case.call(loaded, t), case.call(case.mixed, t))
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert told["runtime"] == STEPS.to_json()
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again["digest"] == told["digest"]
    network = at_rest(tmp_path)  # as exports read it, to formats that have no word for steps
    seen = gguf.outlook(network), onnx.outlook(network, case.arguments | {case.t: torch.tensor(0)})
    assert all("the policy first=1,last=1: all steps are alike" in one.left for one in seen)
    loaded.dequantize()
    assert torch.equal(case.call(loaded, 600), case.call(case.floats, 600))


def test_without_a_policy_nothing_of_an_artifact_is_new(case: Case) -> None:
    config = hub.StepquantConfig(**case.artifact.to_json())
    assert "runtime" not in config.to_dict()
    assert "runtime" not in config.described()
    with_one = hub.StepquantConfig(**replace(case.artifact, policy=STEPS).to_json())
    assert with_one.digest != config.digest


def test_bfloat16_stays_bfloat16(case: Case, tmp_path: Path) -> None:
    model = copy.deepcopy(case.model)
    hub.attach(model, replace(case.artifact, policy=STEPS))
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    x = case.arguments[case.x].bfloat16()
    got = case.call(half, 0, **{case.x: x})
    assert got.dtype == torch.bfloat16
    assert relative(got.float(), case.call(case.floats, 0)) < 0.03


def test_inspecting_sees_the_steps_in_integers(case: Case) -> None:
    arguments = case.arguments | {case.t: torch.tensor(STEPS.middle)}
    assert (
        coverage(case.mixed, arguments).share_of_planned
        == coverage(case.whole, arguments).share_of_planned
        > 0
    )
    assert coverage(case.mixed, arguments | {case.t: torch.tensor(0)}).share_of_planned == 0


@pytest.fixture
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("forgotten")
def test_compiling_leaves_a_policy_to_the_interpreter(case: Case) -> None:
    compiled = torch.compile(case.mixed, backend=aot_eager)
    for t in (0, 600, 0, 300):
        assert torch.equal(case.call(compiled, torch.tensor(t)), case.call(case.mixed, torch.tensor(t)))


def test_what_does_not_go_together_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="another component"):
        lower(make_unet(), replace(case.artifact, policy=replace(STEPS, scope="transformer")))
    ones = torch.ones(len(TIMES), 3)
    corrected = case.artifact.with_correction(StepCorrection(ones, ones, ones), StepTable.of(TIMES))
    with pytest.raises(ArtifactError, match="corrected"):
        lower(make_unet(), replace(corrected, policy=STEPS))
    with pytest.raises(PlanError, match="t of a sampler"):
        hub.StepquantConfig("w8a8-dynamic", runtime=STEPS.to_json())
    config = hub.StepquantConfig(**replace(case.artifact, policy=STEPS).to_json())
    with pytest.raises(ArtifactError, match="denoisers"):
        TransformersQuantizer(config)
    (tmp_path / "transformer").mkdir()
    foreign = {"quantization_config": {"quant_method": "modelopt", "runtime": STEPS.to_json()}}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(ArtifactError, match="modelopt"):
        hub.check_folder(tmp_path)
