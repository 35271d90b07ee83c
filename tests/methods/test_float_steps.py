"""Steps that a policy keeps in float, while methods look for ranges and learn: against networks that round nothing there."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel

from stepquant import methods
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.policy import FloatSteps, StepPolicy
from stepquant.core.ranges import minmax
from stepquant.fit.ranges import in_integers, set_input_ranges, set_weight_ranges
from stepquant.methods.correction import Correction
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import lower
from tests.conftest import make_one_level
from tests.contracts.smallest import FEW, made, smallest
from tests.runtime.synthetic import relative

WHOLE = [name for name in methods.names() if not issubclass(methods.kind(name), Correction)]


@pytest.fixture
def unet() -> UNet2DModel:
    return make_one_level()


@pytest.fixture
def source(pipeline: DDIMPipeline, tmp_path: Path) -> Source:
    return Source(pipeline, Sampling(FEW), batch=4, cache=tmp_path)


def spared(source: Source, plan: Plan, **policy: int) -> Plan:
    return replace(plan, float_steps=FloatSteps.of(StepPolicy(**policy), "unet", source.times()))


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", WHOLE)
def test_every_method_keeps_the_steps_of_its_plan(source: Source, name: str) -> None:
    plan = spared(source, scheme("w8a8"), last=1)
    artifact = made(smallest(name, **({"inter": False} if name == "qncd" else {})), plan, source)
    assert artifact.policy == plan.float_steps
    lowered = lower(copy.deepcopy(source.pipeline.unet), artifact, torch.float32)
    for t in source.times():
        assert lowered(torch.zeros(1, 3, 8, 8), t).sample.isfinite().all()


def test_simulation_is_what_runs(source: Source) -> None:
    """At the steps in float, in integers, and where one batch has both."""
    denoiser, data = Denoiser.of(source.pipeline), source.record(every(2, range(source.steps)))
    plan = spared(source, scheme("w8a8"), first=1, last=1)
    float_model = copy.deepcopy(denoiser.model)
    with torch.no_grad(), insert(denoiser, plan) as network:
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax, batch=4)
        lowered = Denoiser(lower(float_model, freeze(network), torch.float32))
        inner = set(data.steps().tolist()) - {0, source.steps - 1}
        for step in (*range(source.steps), None):
            chosen = [n for n, one in enumerate(data.steps().tolist()) if step in (one, None)]
            arguments = data.take(chosen).arguments
            simulated = denoiser.predict(arguments)
            network.switch(weights=True, inputs=False)
            floats = denoiser.predict(arguments)
            network.switch(weights=True, inputs=True)
            lost, apart = (relative(simulated, other) for other in (floats, lowered.predict(arguments)))
            if step is None or step in inner:
                assert (
                    apart < lost / 2
                )  # a number between two integers may become the one here and the other there
            else:
                assert lost < 1e-6
                assert apart < 1e-5


def test_records_of_steps_in_float_decide_no_range(source: Source) -> None:
    denoiser, data = Denoiser.of(source.pipeline), source.record(every(4, range(source.steps)))
    plan = spared(source, scheme("w8a8"), last=2)
    inner = in_integers(data, plan.float_steps)
    assert inner is not None
    assert set(inner.steps().tolist()) == set(range(source.steps - 2))
    scales = []
    for some, asked in ((data, plan), (inner, plan), (inner, scheme("w8a8")), (data, scheme("w8a8"))):
        with insert(denoiser, asked) as network:
            set_weight_ranges(network, minmax)
            set_input_ranges(network, some, minmax, batch=4)
            scales.append(torch.cat([quantizer.scale for quantizer in network.ranged()]))
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[1], scales[2])
    assert not torch.equal(scales[2], scales[3])


@pytest.mark.usefixtures("coarse")
def test_nothing_is_learnt_for_activations_of_steps_in_float(source: Source) -> None:
    plan = spared(source, scheme("w8a8"), last=1)
    still, moved = (
        made(smallest("eda_dm", by_step="always", step_rate=0.05, iterations=count), plan, source)
        for count in (0, 8)
    )
    names = [name for name in moved.tensors if name.endswith(".input_scale")]
    ratios = torch.stack([moved.tensors[name] / still.tensors[name] for name in names])
    assert (ratios[:, -1] == 1).all()
    assert (ratios[:, :-1] != 1).any(1).float().mean() > 1 / 4


def test_an_interrupted_run_of_another_policy_is_none_of_this_one(source: Source) -> None:
    """What was learnt of blocks is kept under a name of its own."""
    folders = source.cache / "journal"
    for policy in ({"last": 1}, {"last": 2}):
        made(smallest("brecq"), spared(source, scheme("w8a8"), **policy), source)
    assert len(list(folders.iterdir())) == 2
