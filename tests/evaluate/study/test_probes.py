from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline, FluxPipeline, StableDiffusionPipeline
from torch import Tensor

import stepquant
from stepquant import hub
from stepquant.calib.calibset import CalibSet
from stepquant.calib.guided import states_of
from stepquant.calib.pick import every, one_each
from stepquant.calib.record import Source
from stepquant.core.policy import FloatSteps, StepPolicy
from stepquant.errors import EvaluationError, PlanError, StepquantError
from stepquant.evaluate.cost import count_macs
from stepquant.evaluate.study.allocate import Sensitivity
from stepquant.evaluate.study.automatic import automatic
from stepquant.evaluate.study.probes import CANDIDATES, error_of, estimate
from stepquant.evaluate.study.sensitivity import Study, sensitivity
from stepquant.evaluate.study.sites import StudiedSite, plan_with, studied_sites
from stepquant.fit.alone import set_ranges
from stepquant.job import Recipe
from stepquant.models.call import Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.roles import embeddings_in
from stepquant.models.hooks import first_arguments
from stepquant.models.pipelines.calling import guidance_of
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent
from stepquant.quant.auto import BITS, Budget
from stepquant.quant.insert import insert
from tests.evaluate.study.test_sensitivity import FEW, by_site

PORTS = ("weight", "input")
EIGHT = Budget.of("auto-8")
assert EIGHT
WEIGHTS = EIGHT.base()


@pytest.fixture
def known(pipeline: DDIMPipeline, tmp_path: Path) -> Sensitivity:
    denoiser = Denoiser.of(pipeline)
    sites = studied_sites(denoiser, FEW, first_arguments(pipeline, 1), PORTS)
    source = Source(pipeline, Sampling(4), cache=tmp_path)
    data = source.record(one_each(torch.linspace(0, 3, 8).round().long()))
    states = states_of(data, source)
    return estimate(denoiser, FEW, sites, (8,), data, states, Silent(), probes=10, batch=1)


def test_probes_find_what_one_call_for_each_site_measures_and_leave_the_model_as_it_was(
    pipeline: DDIMPipeline, known: Sensitivity, tmp_path: Path
) -> None:
    """At 8 bits, where errors are small; the mean of 80 squares of normal numbers has a spread of 16 %."""
    study = Study(bits=(8,), samples=8, steps=4, ports=PORTS)
    measured = by_site(sensitivity(pipeline, FEW, study, cache=tmp_path))
    assert measured
    for key, value in measured.items():
        assert known.losses[key] == pytest.approx(value**2, rel=0.6), key
    ratios = torch.tensor([known.losses[key] / value**2 for key, value in measured.items()])
    assert ratios.log().mean().abs() < 0.15
    parameters = list(pipeline.unet.parameters())
    assert all(weight.requires_grad and weight.grad is None for weight in parameters)
    assert not any(layer._forward_pre_hooks for layer in pipeline.unet.modules())
    assert not any(weight._post_accumulate_grad_hooks for weight in parameters)


def rounded(denoiser: Denoiser, site: StudiedSite, data: CalibSet) -> Iterator[None]:
    """The network with this one weight of 8 bits."""
    weight = denoiser.model.get_submodule(site.path).weight
    former = weight.detach().clone()
    with insert(denoiser, plan_with("one", WEIGHTS, {site.key: 8}, [site])) as network:
        set_ranges(network, data, CANDIDATES)
        (quantizer,) = (one for one in network.quantizers() if str(one.site) == site.key)
        error = error_of(quantizer, former)
    with torch.no_grad():
        weight.add_(error.view_as(former))
        yield
        weight.copy_(former)


def test_of_a_guided_network_they_find_what_the_sampler_reads(
    class_pipeline: DiTPipeline, tmp_path: Path
) -> None:
    """Beside it: every weight rounded in turn, the network called, and the guidance of diffusers' pipeline written out."""
    denoiser, scale = Denoiser.of(class_pipeline), 4.0
    assert inspect.signature(DiTPipeline.__call__).parameters["guidance_scale"].default == scale
    source = Source(class_pipeline, Sampling(4), cache=tmp_path)
    data = source.record(every(2, (0, 1, 3)))
    batch = data.take(range(len(data)))
    sites = studied_sites(denoiser, WEIGHTS, batch.arguments, ("weight",))
    found = estimate(denoiser, WEIGHTS, sites, (8,), data, states_of(data, source), Silent(), probes=20)

    def guided() -> Tensor:
        with torch.no_grad():
            predicted = denoiser.predict(batch.arguments)
        rows = {
            (int(t), int(s), int(b)): row
            for t, s, b, row in zip(batch.trajectory, batch.step, batch.branch, predicted)
        }
        assert len(rows) == 2 * 2 * 3
        pairs = [(rows[t, s, 0], rows[t, s, 1]) for t in (0, 1) for s in (0, 1, 3)]
        return torch.stack([without + scale * (within - without) for without, within in pairs]).flatten(1)

    target, ratios = guided(), {}
    for site in sites:
        for _ in rounded(denoiser, site, data):
            loss = ((guided() - target).norm(dim=1) / target.norm(dim=1)).square().mean()
        ratios[site.path] = found.losses[site.key, 8] / float(loss)
    tables = [ratios[path] for path in embeddings_in(class_pipeline.transformer)]
    assert tables
    assert all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios
    assert torch.tensor(list(ratios.values())).log().mean().abs() < 0.15
    assert torch.tensor(tables).log().mean().abs() < 0.3


def test_guidance_is_that_of_the_call(text_pipeline: StableDiffusionPipeline) -> None:
    assert guidance_of(text_pipeline, "a cat") == 7.5
    assert guidance_of(text_pipeline, Call.of({"prompt": "a cat", "guidance_scale": 3})) == 3
    assert guidance_of(text_pipeline, Call.of({"prompt": "a cat", "guidance_scale": 1.0})) is None
    assert inspect.signature(FluxPipeline.__call__).parameters["guidance_scale"].default > 1
    assert guidance_of(FluxPipeline.__new__(FluxPipeline), None) is None  # its network reads that number


@pytest.mark.parametrize("scale", [2.0, 7.5])
def test_states_are_pairs_of_branches(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path, scale: float
) -> None:
    calls = tuple(
        Call.of(
            {"prompt": text, "guidance_scale": scale, "num_inference_steps": 3, "height": 16, "width": 16}
        )
        for text in ("a", "b")
    )
    source = Source(text_pipeline, Sampling(3, None, calls), cache=tmp_path)
    data = source.record(every(2, (0, 2)))
    states = states_of(data, source)
    assert len(states) == 4
    assert {state.factors for state in states} == {(1 - scale, scale)}
    for state in states:
        batch = data.take(state.records)
        assert batch.branch.tolist() == [0, 1]
        assert len(set(batch.step.tolist())) == len(set(batch.trajectory.tolist())) == 1
    one_lacks = data.subset(range(len(data) - 1))
    assert [state.factors for state in states_of(one_lacks, source)] == [(1.0,)] * 7


def stored_bits(pipeline: Any, port: str) -> dict[str, int]:
    rules = hub.config_of(Denoiser.of(pipeline).model).recipe["allocated"]  # type: ignore[union-attr]
    return {
        rule["path"]: int(rule["grid"].split("int")[1].split("/")[0])
        for rule in rules
        if rule["ports"] == [port] and "[01]" not in rule["path"] and "prediction" in rule["reason"]
    }


def test_the_averages_are_kept_and_bits_differ(pipeline: DDIMPipeline) -> None:
    denoiser = Denoiser.of(pipeline)
    sizes = {path: denoiser.model.get_submodule(path).weight.numel() for path in denoiser.sites()}  # type: ignore[operator, union-attr]
    macs = count_macs(denoiser, first_arguments(pipeline, 1))
    stepquant.quantize(pipeline, method="minmax", scheme="auto-3.5a5", steps=4, samples=4)
    for port, cost, wanted in (("weight", sizes, 3.5), ("input", macs, 5)):
        bits = stored_bits(pipeline, port)
        cost = {path: cost[path.removesuffix(".[01]")] for path in bits}
        average = sum(width * cost[path] for path, width in bits.items()) / sum(cost.values())
        assert wanted - 0.3 < average <= wanted + 0.01
        assert len(set(bits.values())) > 2


def test_above_eight_bits_some_inputs_stay_float(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    """Their products stay within the budget; packed, the folder predicts as before and says which they are, and why."""
    denoiser = Denoiser.of(pipeline)
    arguments = first_arguments(pipeline, 1)
    macs = count_macs(denoiser, arguments)
    stepquant.quantize(pipeline, method="minmax", scheme="auto-8a14", steps=4, samples=4)
    rules = hub.config_of(pipeline.unet).recipe["allocated"]
    known = [rule for rule in rules if rule["ports"] == ["input"] and "prediction" in rule["reason"]]
    cost = {rule["path"]: macs[rule["path"]] for rule in known if "[01]" not in rule["path"]}
    floats = [rule["path"] for rule in known if rule["grid"] == "float" and rule["path"] in cost]
    assert 0 < sum(cost[path] for path in floats) <= 6 / 24 * sum(cost.values())
    assert all("float, where 8 bits move" in rule["reason"] for rule in known if rule["grid"] == "float")
    layers = hub.config_of(pipeline.unet).layers
    stored = [path for path in floats if path in layers]
    assert stored
    assert all(layers[path].get("input") is None and layers[path]["weight"] for path in stored)
    pipeline.save_pretrained(tmp_path / "out")
    again = stepquant.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.unet(**arguments).sample, pipeline.unet(**arguments).sample)


def test_tables_of_classes_share_the_average(class_pipeline: DiTPipeline) -> None:
    model = class_pipeline.transformer
    sizes = {
        name.removesuffix(".weight"): value.numel()
        for name, value in model.named_parameters()
        if name.endswith(".weight")
    }
    tables = embeddings_in(model)
    stepquant.quantize(class_pipeline, method="minmax", scheme="auto-4.5", steps=4, samples=4)
    bits = stored_bits(class_pipeline, "weight")
    assert set(tables) < set(bits)
    average = sum(width * sizes[path] for path, width in bits.items()) / sum(sizes[path] for path in bits)
    assert 4.2 < average <= 4.53  # what has 8 bits needs no zero points, and others have their bytes


@pytest.mark.parametrize(
    "name", ["auto", "auto-", "auto-1.5", "auto-9", "auto-4a1", "auto-4a33", "auto-4.5b"]
)
def test_a_name_that_is_no_budget_is_one_error(name: str) -> None:
    with pytest.raises(PlanError, match="no scheme has this name"):
        Budget.of(name)


@pytest.mark.parametrize(
    "name, grid",
    [
        ("auto-2.5", "int2/channel/codebook"),
        ("auto-3.9", "int3/channel/codebook"),
        ("auto-4.5", "int4/channel/asym"),
        ("auto-2000000bytes", "int4/channel/asym"),
        ("auto-8", "int8/channel"),
    ],
)
def test_weights_of_few_bits_leave_no_integer_idle(name: str, grid: str) -> None:
    budget = Budget.of(name)
    assert budget
    assert [str(rule.grid) for rule in budget.base().rules if rule.ports == ("weight",)] == [grid]


@pytest.mark.parametrize(
    "name, grid",
    [
        ("auto-4.5", "uint8/tensor"),
        ("auto-4.5a7.9", "uint7/tensor/codebook"),
        ("auto-4.5a4", "uint4/tensor/codebook"),
    ],
)
def test_activations_of_few_bits_have_codebooks(name: str, grid: str) -> None:
    budget = Budget.of(name)
    assert budget
    assert [str(rule.grid) for rule in budget.base().rules][-1] == grid


def test_a_budget_that_nothing_fits_names_the_least(pipeline: DDIMPipeline) -> None:
    with pytest.raises(EvaluationError, match="no choice fits the budget") as raised:
        stepquant.quantize(pipeline, method="minmax", scheme="auto-1000bytes", steps=4, samples=4)
    assert "at least" in str(raised.value)


def test_a_plan_beside_a_budget_is_refused() -> None:
    with pytest.raises(StepquantError, match="makes its plan itself"):
        Recipe.of(scheme="auto-4.5", plan={"name": "mine", "rules": []}).check()


def test_at_steps_that_a_policy_keeps_in_float_inputs_are_not_probed(
    pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    source, denoiser = Source(pipeline, Sampling(4), cache=tmp_path), Denoiser.of(pipeline)
    budget = Budget.of("auto-4.5a5")
    assert budget
    policy = FloatSteps.of(StepPolicy(first=1, last=1), "unet", source.times())
    found = {told: automatic(denoiser, budget, source, told) for told in (None, policy)}
    data = source.record(every(4, range(4)))
    batch = data.take(range(len(data)))
    inner = batch.arguments[data.t].unique()[1:-1]
    states = [
        one
        for one in states_of(data, source)
        if bool(torch.isin(batch.arguments[data.t][one.records[0]], inner))
    ]
    assert len(states) == 8
    sites = [
        one for one in studied_sites(denoiser, budget.base(), batch.arguments, PORTS) if one.port == "input"
    ]
    known = estimate(denoiser, budget.base(), sites, BITS, data, states, Silent())
    reasons = {told: {(r.path, r.ports): r.reason for r in plan.rules} for told, plan in found.items()}
    probed = [
        key
        for key, reason in reasons[policy].items()
        if key[1] == ("input",) and "move" in reason and "[" not in key[0]
    ]
    assert len(probed) > 5
    for path, ports in probed:
        moved = re.search(r"(\d+) bits move the prediction by ([\d.e+-]+) %", reasons[policy][path, ports])
        assert moved
        loss = known.losses[f"{path}:input", int(moved[1])]
        assert float(moved[2]) == pytest.approx(100 * loss**0.5, rel=0.06)
    for key, reason in reasons[None].items():
        if key[1] == ("weight",):
            assert reasons[policy][key] == reason
