from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline

import stepquant
from stepquant import hub
from stepquant.calib.pick import one_each
from stepquant.calib.record import Source
from stepquant.errors import EvaluationError, PlanError, StepquantError
from stepquant.evaluate.cost import count_macs
from stepquant.evaluate.study.allocate import Sensitivity
from stepquant.evaluate.study.probes import estimate
from stepquant.evaluate.study.sensitivity import Study, sensitivity
from stepquant.evaluate.study.sites import studied_sites
from stepquant.job import Recipe
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.roles import embeddings_in
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent
from stepquant.quant.auto import Budget
from tests.evaluate.study.test_sensitivity import FEW, by_site

PORTS = ("weight", "input")


@pytest.fixture
def known(pipeline: DDIMPipeline, tmp_path: Path) -> Sensitivity:
    denoiser = Denoiser.of(pipeline)
    sites = studied_sites(denoiser, FEW, first_arguments(pipeline, 1), PORTS)
    data = Source(pipeline, Sampling(4), cache=tmp_path).record(
        one_each(torch.linspace(0, 3, 8).round().long())
    )
    return estimate(denoiser, FEW, sites, (8,), data, Silent(), probes=10, batch=1)


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
    assert 4.2 < average <= 4.51


@pytest.mark.parametrize("name", ["auto", "auto-", "auto-1.5", "auto-9", "auto-4a1", "auto-4.5b"])
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


def test_a_budget_that_nothing_fits_names_the_least(pipeline: DDIMPipeline) -> None:
    with pytest.raises(EvaluationError, match="no choice fits the budget") as raised:
        stepquant.quantize(pipeline, method="minmax", scheme="auto-1000bytes", steps=4, samples=4)
    assert "at least" in str(raised.value)


def test_a_plan_beside_a_budget_is_refused() -> None:
    with pytest.raises(StepquantError, match="makes its plan itself"):
        Recipe.of(scheme="auto-4.5", plan={"name": "mine", "rules": []}).check()
