"""Methods on a model that is on another device than the CPU: the same artifact, and no tensor on the wrong side."""

from __future__ import annotations

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepquant.artifact import Artifact
from stepquant.core import ranges
from stepquant.core.losses import per_sample
from stepquant.fit.weights import Weighing, learn_weights
from stepquant.job import Recipe
from stepquant.job.inplace import run
from tests import elsewhere
from tests.models.tiny import unconditional

ONE_LEVEL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
}
FIELDS: dict[str, dict[str, Any]] = {
    "eda_dm": {"iterations": 3, "samples": 16, "trajectories": 6, "mix": 0.5, "keep": 0.5, "bf16": False},
    "gptq": {"samples": 16, "trajectories": 6, "bias": True, "softmax": True},
    "tfmq": {
        "iterations": 3,
        "trajectories": 3,
        "at_steps": 3,
        "time_iterations": 2,
        "range_trajectories": 2,
        "bf16": False,
    },
    "minmax+tac": {"minmax.samples": 8},
    "minmax+d2dpm": {"minmax.samples": 8},
}


def quantized(method: str, cache: Path, device: str | None = None) -> Artifact:
    torch.manual_seed(0)
    pipeline = DDIMPipeline(unconditional(**ONE_LEVEL), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    if device is not None:
        pipeline.unet.to(device)
    recipe = Recipe.of(model="tiny", method=method, scheme="w4a8", settings=FIELDS[method], steps=3)
    return run(pipeline, recipe, cache=cache)


def all_both_ways(cache: Path) -> tuple[dict[str, tuple[Artifact, Artifact]], list[torch.Tensor]]:
    """For a process of its own, because the device stays in it for good."""
    elsewhere.set_up()
    return both_ways(cache), weights_both_ways()


def both_ways(cache: Path) -> dict[str, tuple[Artifact, Artifact]]:
    """Every method on the CPU, and there; attention by the same formula on both."""
    for search in (ranges.lp_search, ranges.lp_search_binned):
        search.__kwdefaults__["candidates"] = 3  # operations are slow there
    found = {}
    with sdpa_kernel(SDPBackend.MATH):
        for method in FIELDS:
            here = quantized(method, cache / "here")
            with elsewhere.Elsewhere():
                found[method] = here, quantized(method, cache / "there", elsewhere.KIND)
    return found


def weights_both_ways() -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, y, start = torch.randn(12, 6), torch.randn(12, 4), torch.randn(4, 6)
    found = []
    with elsewhere.Elsewhere():
        for device in ("cpu", elsewhere.KIND):

            def losses(parameters: Any, records: torch.Tensor, device: str = device) -> torch.Tensor:
                out = torch.nn.functional.linear(x[records].to(device), parameters[0])
                return per_sample(out, y[records].to(device))

            weights = learn_weights(
                losses,
                [copy.copy(start).to(device)],
                torch.arange(6),
                [torch.arange(6, 9), torch.arange(9, 12)],
                Weighing(visits=1, batch=4),
                torch.Generator().manual_seed(0),
            )
            found.append(weights.cpu())
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(all_both_ways, tmp_path_factory.mktemp("device")).result()


@pytest.mark.parametrize("method", FIELDS)
def test_an_artifact_made_on_another_device(method: str, made: Any) -> None:
    here, there = made[0][method]
    assert there.to_json()["layers"] == here.to_json()["layers"]
    assert set(there.tensors) == set(here.tensors)
    for name, value in here.tensors.items():
        assert there.tensors[name].device.type == "cpu"
        if ".correction_" in name:  # integers run by other kernels there
            torch.testing.assert_close(there.tensors[name], value, rtol=0.05, atol=0.01)
        else:
            assert torch.equal(there.tensors[name], value), name


def test_weights_of_samples_learnt_on_another_device(made: Any) -> None:
    """Without a block of a model: that device cannot differentiate a group norm twice."""
    here, there = made[1]
    assert torch.equal(here, there)
    assert len(here.unique()) > 1
