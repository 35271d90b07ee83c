from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline

from stepquant import hub, methods
from stepquant.calib.record import Source
from stepquant.errors import EvaluationError, UnknownNameError
from stepquant.evaluate.speed.layers import clocks, layer_times, read_times
from stepquant.evaluate.study.allocate import allocate, read_sensitivity
from stepquant.evaluate.study.sites import StudiedSite
from stepquant.evaluate.twins import Twins
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import prepare
from tests.runtime.test_steps import noise, stepped

BITS = (2, 4, 8)


def study(metrics: tuple[str, ...] = ("noise",)) -> dict[str, Any]:
    """Three layers and an attention product, with losses of no particular order."""
    layers = {"a": ("conv", 300, 1000), "b": ("ff_in", 500, 400), "c": ("stem", 90, 700)}
    sites = []
    for path, (role, weights, macs) in layers.items():
        sites.append(StudiedSite(path, role, "weight", "int8/channel", macs, weights, 10))
        if path != "c":  # its input stays float
            sites.append(StudiedSite(path, role, "input", "uint8/tensor", macs))
    for port in ("query", "key", "value", "probabilities"):
        grid = "uint8/tensor/sym" if port == "probabilities" else "int8/tensor"
        sites.append(StudiedSite("d", "product", port, grid, 600))
    rows = [
        {"path": site.path, "role": site.role, "port": site.port, "bits": bits, "metric": metric,
         "value": ((7 * place + 3) % 5 + 1) / bits**2 / 10}
        for place, site in enumerate(sites) for bits in BITS for metric in metrics
    ]  # fmt: skip
    return {"sites": [site.to_json() for site in sites], "rows": rows, "study": {"bits": list(BITS)},
            "plan": scheme("w8a8").to_json()}  # fmt: skip


def test_bytes_are_the_best_of_all_allocations() -> None:
    known = read_sensitivity(study(), "noise")
    weights = [site for site in known.sites if site.port == "weight"]
    every = [
        (
            sum(s.bytes(b) for s, b in zip(weights, picks)),
            sum(known.losses[s.key, b] for s, b in zip(weights, picks)),
        )
        for picks in itertools.product(BITS, repeat=len(weights))
    ]
    for budget in (350, 450, 600, 890, 2000):
        found = allocate(known, "bytes", budget)
        assert found.cost <= budget
        assert found.loss == pytest.approx(min(loss for cost, loss in every if cost <= budget))
        assert set(found.bits) == {site.key for site in weights}
    assert found.uniform[8] == pytest.approx((sum(s.bytes(8) for s in weights), every[-1][1]))


def test_bops_are_the_best_of_all_allocations() -> None:
    known = read_sensitivity(study(), "noise")

    def bops(bits: dict[str, int]) -> int:
        layers = 1000 * bits["a:weight"] * bits["a:input"] + 400 * bits["b:weight"] * bits["b:input"]
        stem = 700 * bits["c:weight"] * 32
        products = 300 * (bits["d:query"] * bits["d:key"] + bits["d:probabilities"] * bits["d:value"])
        return layers + stem + products

    keys = [site.key for site in known.sites]
    every = []
    for picks in itertools.product(BITS, repeat=len(keys)):
        bits = dict(zip(keys, picks))
        every.append((bops(bits), sum(known.losses[key, width] for key, width in bits.items())))
    for budget in (60_000, 120_000, 200_000):
        found = allocate(known, "bops", budget)
        assert found.cost == bops(dict(found.bits)) <= budget  # type: ignore[arg-type]
        assert found.loss == pytest.approx(min(loss for cost, loss in every if cost <= budget))


def test_inputs_are_the_best_of_all_allocations_and_float_where_eight_bits_leave_room() -> None:
    known = read_sensitivity(study(), "noise")
    macs = {site.key: site.macs for site in known.sites if site.port == "input"}
    for average in (3, 6, 8, 12, 26, 32):
        budget = average * sum(macs.values())
        widths = (8, None) if average > 8 else BITS
        every = []
        for picks in itertools.product(widths, repeat=len(macs)):
            cost = sum((width or 32) * macs[key] for key, width in zip(macs, picks))
            losses = [known.losses[key, width] for key, width in zip(macs, picks) if width]
            every.append((cost, sum(losses)))
        found = allocate(known, "inputs", budget)
        assert set(found.bits) == set(macs)
        assert found.cost == sum((width or 32) * macs[key] for key, width in found.bits.items()) <= budget
        assert found.loss == pytest.approx(min(loss for cost, loss in every if cost <= budget))
        floats = [key for key, width in found.bits.items() if width is None]
        assert len(floats) == {26: 1, 32: 2}.get(average, 0)


def test_milliseconds_decide_what_runs_in_integers() -> None:
    known = read_sensitivity(study(), "noise")
    times = {("a", True): 1.0, ("a", False): 3.0, ("b", True): 2.0, ("b", False): 2.5}
    assert set(allocate(known, "ms", 5.5, times).bits.values()) == {None}
    found = allocate(known, "ms", 4.0, times)
    assert found.cost <= 4.0
    assert found.bits["a:weight"] == 8
    assert found.bits["b:weight"] is None
    assert set(found.bits) == {"a:weight", "a:input", "b:weight", "b:input"}  # others were not timed
    with pytest.raises(EvaluationError, match="at least 3"):
        allocate(known, "ms", 2.0, times)
    with pytest.raises(EvaluationError, match="no layer of this study was timed"):
        allocate(known, "ms", 2.0, {})


def test_content_and_quality_are_judged_by_different_metrics() -> None:
    data = study(("ssim", "features"))
    for row in data["rows"]:
        if (row["metric"] == "ssim") != (row["role"] == "ff_in"):
            row["value"] = 0.5 if row["metric"] == "ssim" else 100 * row["bits"]  # nobody should look at it
    known = read_sensitivity(data, "decoupled")
    content = [loss for (key, _), loss in known.losses.items() if key.startswith("b:")]
    assert sum(content) == pytest.approx(1)
    assert sum(known.losses.values()) == pytest.approx(2)
    assert known.losses["a:weight", 2] > known.losses["a:weight", 8]


@pytest.mark.parametrize(("damage", "message"), [("sites", "no sensitivity study"), ("rows", "not complete"), ("value", "no sensitivity study")])  # fmt: skip
def test_wrong_files_are_one_clear_error(damage: str, message: str) -> None:
    data = study()
    if damage == "rows":
        del data["rows"][4]
    elif damage == "value":
        data["rows"][4]["value"] = "much"
    else:
        del data["sites"]
    with pytest.raises(EvaluationError, match=message):
        read_sensitivity(data, "noise")


def test_a_metric_that_was_not_studied_is_named() -> None:
    with pytest.raises(UnknownNameError, match="psnr"):
        read_sensitivity(study(), "psnr")


def test_the_plan_gives_every_site_its_bits(pipeline: DDIMPipeline, source: Source, tmp_path: Path) -> None:
    """Through JSON and a method, down to the packed bytes that the budget counted."""
    from stepquant.evaluate.study.sensitivity import Study, sensitivity

    data = sensitivity(
        pipeline, scheme("w8a8"), Study((3, 6), samples=2, steps=2, ports=("weight",)), cache=tmp_path
    )
    known = read_sensitivity(data, "noise")
    whole = sum(site.bytes(6) for site in known.sites if site.port == "weight")
    found = allocate(known, "bytes", 0.75 * whole)
    assert len(set(found.bits.values())) == 2
    denoiser = Denoiser.of(pipeline)
    plan = Plan.from_json(found.plan.to_json())
    decided = plan.resolve(denoiser)
    for key, width in found.bits.items():
        path, _, port = key.partition(":")
        grid = decided[path, port].grid  # type: ignore[index]
        assert grid is not None
        assert grid.bits == width
    artifact = methods.build("minmax", {"samples": 2})(denoiser, plan, source)
    packed = [
        value.nbytes
        for name, value in artifact.tensors.items()
        if name.endswith((".weight", ".weight_scale"))
    ]
    assert sum(packed) == found.cost


def test_layers_are_timed_one_by_one(pipeline: DDIMPipeline, source: Source) -> None:
    other = copy.deepcopy(pipeline)
    hub.attach(
        other.unet, methods.build("minmax", {"samples": 2})(Denoiser.of(pipeline), scheme("w8a8"), source)
    )
    found = layer_times(Twins(pipeline, other), batch=2, rounds=2)
    times = read_times(found)
    assert {path for path, integer in times if not integer} == set(Denoiser.of(pipeline).sites())
    assert {path for path, integer in times if integer} == set(Denoiser.of(pipeline).sites())
    assert all(value > 0 for value in times.values())
    assert not any(module._forward_hooks for module in other.unet.modules())
    with clocks(pipeline.unet, ["conv_in"]) as seen:
        assert seen == {}
    for wrong in (
        {},
        {"rows": [{"path": "a"}]},
        {"rows": [{"path": "a", "integer": True, "milliseconds": -1}]},
    ):
        with pytest.raises(EvaluationError):
            read_times(wrong)


@pytest.mark.parametrize("table", [False, True])
def test_layers_of_an_artifact_that_knows_some_times_only(source: Source, table: bool) -> None:
    artifact, _, _ = stepped(source, groups=2, table=table)
    other = copy.deepcopy(source.pipeline)
    hub.attach(other.unet, artifact)
    t = source.times()[1]
    other.unet = prepare(other.unet, torch.float32)
    with torch.no_grad():
        fused = other.unet(noise(2), t).sample
        apart = prepare(copy.deepcopy(other.unet), torch.float32, fuse=False)(noise(2), t).sample
    torch.testing.assert_close(apart, fused, rtol=0.02, atol=0.02)
    times = read_times(layer_times(Twins(source.pipeline, other), batch=2, rounds=2))
    integer = {path for path, whole in times if whole}
    assert ("time_embedding.linear_1" in integer) != table
    assert "conv_in" in integer
