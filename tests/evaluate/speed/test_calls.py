from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline

from stepquant.errors import EvaluationError
from stepquant.evaluate.disk import size
from stepquant.evaluate.speed import calls as speed
from stepquant.evaluate.speed.calls import benchmark, best, cast
from stepquant.evaluate.speed.turns import interleave, summarize
from stepquant.models.hooks import first_arguments
from tests.models.tiny import CASES


def test_every_round_calls_everyone_and_another_one_begins() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    rounds = interleave(calls, seconds=0, fewest=4, untimed=0)
    assert "".join(seen) == "abc" + "bca" + "cab" + "abc"
    assert [set(taken) for taken in rounds] == [set("abc")] * 4


def test_a_first_call_that_finds_the_traces_of_another_contender_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call(name: str) -> None:
        clock[0] += 0.001 if seen and seen[-1] == name else 0.02
        seen.append(name)

    rounds = interleave({"a": lambda: call("a"), "b": lambda: call("b")}, seconds=0, fewest=3)
    assert "".join(seen) == "aabb" + "bbaa" + "aabb"
    assert all(taken[name] < 20 for taken in rounds[:1] for name in "ab")


def test_time_is_that_of_the_call() -> None:
    rounds = interleave({"slow": lambda: time.sleep(0.02), "none": lambda: None}, seconds=0, fewest=3)
    assert all(taken["slow"] >= 20 > taken["none"] for taken in rounds)


def test_the_compiler_gets_weights_as_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[str] = []

    def seen(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        inputs.extend(node.name for node in graph.graph.nodes if node.op == "placeholder")
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=seen))
    model, x = torch.nn.Linear(3, 2).requires_grad_(False), torch.ones(1, 3)
    with torch.no_grad():
        assert speed.frozen(model)(x).equal(model(x))
    assert len(inputs) == 1


def test_ratio_is_taken_within_rounds() -> None:
    """A machine that slows down by ten in the middle changes times and leaves ratios."""
    rounds = [{"ref": 8.0 * load, "new": 2.0 * load} for load in (1, 1, 10, 10, 1)]
    found = summarize(rounds, "new", "ref")
    assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == (4, 4, 4)
    times = [2, 2, 20, 20, 2]
    assert [found[key] for key in ("low", "milliseconds", "high")] == np.percentile(
        times, [25, 50, 75]
    ).tolist()
    assert "ratio" not in summarize(rounds, "new", "absent")


def test_benchmark_has_a_row_for_everyone(pipeline: DDIMPipeline) -> None:
    torch.set_num_threads(2)
    found = benchmark(
        pipeline, pipeline, batches=(1, 2), baselines=("fp32 eager", "bf16 eager"), seconds=0.01, count=1
    )
    after = torch.get_num_threads()
    torch.set_num_threads(1)
    assert after == 2
    assert found["threads"] == 1
    expected = list(itertools.product((1, 2), ("fp32 eager", "bf16 eager", "stepquant")))
    assert [(row["batch"], row["name"]) for row in found["rows"]] == expected
    assert all(row["milliseconds"] > 0 for row in found["rows"])
    assert found["rows"][0]["ratio"] == 1
    assert found["rows"][0]["layout"] in ("channels-first", "channels-last")


@pytest.mark.parametrize(
    "words, shown",
    [
        ("no compiler\nlong trace", "no compiler"),
        ("it raised:\nno file\ntrace", "it raised: no file"),
        ("", ""),
    ],
)
def test_a_baseline_that_cannot_run_is_a_row_with_a_reason(words: str, shown: str) -> None:
    def broken() -> list[speed.Contender]:
        raise RuntimeError(words)

    found = best("bf16 compiled", broken)
    assert found.call is None
    assert found.unavailable == f"RuntimeError: {shown}"
    assert speed.row(1, found, [])["milliseconds"] is None


def test_the_fastest_layout_stands_for_the_baseline() -> None:
    ways = [
        speed.Contender("slow", lambda: time.sleep(0.01), "slow"),
        speed.Contender("fast", lambda: None, "fast"),
    ]
    found = best("fp32 eager", lambda: ways)
    assert (found.name, found.layout) == ("fp32 eager", "fast")


def test_arguments_are_those_of_the_first_step(pipeline: DDIMPipeline) -> None:
    found = first_arguments(pipeline, 3)
    assert found["sample"].shape == (3, 3, 8, 8)
    half = cast(found, torch.bfloat16, torch.channels_last)
    assert half["sample"].dtype == torch.bfloat16
    assert half["sample"].is_contiguous(memory_format=torch.channels_last)
    assert half["timestep"].dtype == found["timestep"].dtype


def test_size_is_that_of_the_files(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    found = size(pipeline, tmp_path)
    assert found["bytes"] == (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert found["ratio"] == pytest.approx(1, abs=0.2)  # a header on a few thousand numbers
    assert found["float_bytes"] == 4 * sum(p.numel() for p in pipeline.unet.parameters())
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="no weight files"):
        size(pipeline, tmp_path / "empty")


def test_wrong_requests_are_named(pipeline: DDIMPipeline) -> None:
    with pytest.raises(EvaluationError, match="fp64 eager"):
        benchmark(pipeline, baselines=("fp64 eager",), batches=(1,))
    with pytest.raises(EvaluationError, match="positive"):
        benchmark(pipeline, batches=(0,))


@pytest.mark.parametrize("native", [True, False])
def test_baselines_come_in_the_type_that_the_machine_multiplies(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "multiplies_bf16", lambda device: native)
    monkeypatch.setattr(speed, "peers_installed", lambda: True)
    expected = {
        True: ("fp32 eager", "bf16 eager", "bf16 compiled", "OpenVINO bf16", "OpenVINO INT8"),
        False: ("fp32 eager", "fp32 compiled", "OpenVINO fp32", "OpenVINO INT8"),
    }
    assert speed.baselines_here() == expected[native]


def test_models_of_films_are_timed_in_both_layouts() -> None:
    """Their convolutions have five dimensions."""
    model, arguments, _ = CASES["wan"]()
    (only,) = speed.in_layouts(
        model, arguments, torch.float32
    )  # where patches alone are convolved, one will do
    assert best("fp32 eager", lambda: [only]).layout == "channels-first"
    model.also = torch.nn.Conv3d(2, 2, 3)
    want = speed.calling(model, arguments)()
    first, last = speed.in_layouts(model, arguments, torch.float32)
    assert first.call is not None
    assert last.call is not None
    torch.testing.assert_close(first.call(), want)
    torch.testing.assert_close(last.call(), want)
    assert best("fp32 eager", lambda: [first, last]).unavailable == ""
