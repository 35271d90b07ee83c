"""Weights on codebooks, under the methods that round and learn them, in the artifact and in the kernels."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from stepquant.artifact import Artifact, LayerSpec
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.hub.exports.gguf import Q8_0, block_of
from stepquant.hub.exports.sdnq import INT8, kind_of
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import integer_layer, lower
from tests.conftest import make_one_level
from tests.contracts.smallest import made, smallest
from tests.methods.reloaded import reloaded

pytestmark = pytest.mark.usefixtures("coarse")
METHODS = {
    "minmax": {},
    "brecq": {"iterations": 4},
    "gac": {},
    "gptq": {},
    "svdquant": {"rank": 2},
    "mixdq": {},
    "dilatequant": {},
    "efficientdm": {"rank": 2},
    "quest": {"tuned": "all", "tuning_iterations": 4, "weight_scale_rate": 0.01},
}


@pytest.fixture
def small(source: Source) -> Source:
    pipeline = DDIMPipeline(make_one_level(groups=4), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return replace(source, pipeline=pipeline, sampling=Sampling(4))


def plan(bits: int) -> Plan:
    grid = Grid.parse(f"int{bits}/channel/codebook")
    return scheme("w4a8").with_rules([Rule(grid, "few integers", ("conv", "q"), ("weight",))], "codebooks")


def run(source: Source, name: str, bits: int = 2, **settings: Any) -> Artifact:
    return made(smallest(name, **settings), plan(bits), source)


@pytest.mark.parametrize("name", METHODS)
def test_methods_round_to_the_integers_that_each_channel_has(name: str, small: Source) -> None:
    artifact = run(small, name, **METHODS[name])
    denoiser = Denoiser.of(small.pipeline)
    lowered = lower(copy.deepcopy(denoiser.model), artifact, torch.float32)
    found = {path: spec.weight for path, spec in artifact.layers.items() if spec.weight.codebook}
    assert found
    for path, grid in found.items():
        layer: Any = lowered.get_submodule(path)
        assert layer.integer
        codebook = artifact.tensors[f"{path}.weight_codebook"]
        assert codebook.shape == (layer.weight_shape[0], 2**grid.bits)
        assert codebook.dtype == torch.int8
        for row, own in zip(layer.signed_bytes().flatten(1), codebook):
            assert {*row.tolist()} <= {*own.tolist()}
        assert len(artifact.tensors[f"{path}.weight"]) == -(-layer.weight_shape.numel() * grid.bits // 8)
    (records,) = small.record(every(1, [1])).batches(2)
    with torch.no_grad():
        want, got = (one.predict(records.arguments) for one in (denoiser, Denoiser(lowered)))
    assert (want - got).norm() < want.norm()


def test_learning_moves_weights_to_other_integers_of_their_codebook(small: Source) -> None:
    few = {"tuned": "all", "time_iterations": 0, "weight_rate": 0.03, "samples": 16, "batch": 8}
    learnt, base = (run(small, "quest", **few, tuning_iterations=count) for count in (40, 0))
    named = [name for name in base.tensors if name.endswith("weight_codebook")]
    assert named
    for name in named:
        assert torch.equal(learnt.tensors[name], base.tensors[name])
    weights = [name.removesuffix("_codebook") for name in named]
    assert any(not torch.equal(learnt.tensors[name], base.tensors[name]) for name in weights)


def test_a_folder_holds_the_codes_and_their_integers_and_loads_to_the_same_bytes(
    small: Source, tmp_path: Path
) -> None:
    loaded = reloaded(small.pipeline, plan(3), tmp_path / "saved")
    again = {name for name, value in loaded.unet.state_dict().items() if value.dtype == torch.int8}
    assert again
    assert all(name.endswith("weight_codebook") for name in again)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_are_those_of_the_same_integers_in_bytes(kind: str, bits: int) -> None:
    torch.manual_seed(bits)
    layer = torch.nn.Linear(48, 20) if kind == "linear" else torch.nn.Conv2d(16, 20, 3, padding=1)
    shape, rows = layer.weight.shape, len(layer.weight)
    codebook = torch.randint(-127, 128, (rows, 2**bits)).sort(1).values
    codes = torch.randint(0, 2**bits, (rows, shape[1:].numel()))
    scale = torch.rand(rows) * 0.01 + 0.001
    few, bytes_ = Grid.parse(f"int{bits}/channel/codebook"), Grid.parse("int8/channel")
    inputs = Grid.parse("uint8/tensor")

    def layer_of(grid: Grid, tensors: dict[str, torch.Tensor]) -> IntegerLayer:
        new = integer_layer(layer, LayerSpec(grid, inputs), "layer")
        ranges = {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.tensor([117]).int()}
        new._buffers |= {"weight_scale": scale, "bias": layer.bias.detach(), **ranges, **tensors}
        return new

    narrow = pack(codes - 2 ** (bits - 1), Grid(bits, symmetric=False))  # the stream of the codes themselves
    own = layer_of(few, {"weight": narrow, "weight_codebook": codebook.to(torch.int8)})
    same = layer_of(bytes_, {"weight": pack(codebook.gather(1, codes), bytes_)})
    x = torch.randn(5, 48) if kind == "linear" else torch.randn(2, 16, 6, 6)
    assert own.integer
    assert torch.equal(own(x), same(x))
    assert torch.equal(own.dequantized(torch.float32), same.dequantized(torch.float32))
    # Other programs' files hold them as the bytes that they are.
    assert torch.equal(own.signed_bytes(), same.signed_bytes())
    assert (block_of(own), kind_of(own)) == (Q8_0, INT8)
