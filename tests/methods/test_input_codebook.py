"""Activations on codebooks: under methods that set and learn ranges, in the artifact, and in the kernels."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from stepquant.artifact import Artifact, LayerSpec
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import quantize
from stepquant.core.codebook import best_bytes, tables_of
from stepquant.core.grid import Grid
from stepquant.core.levels import byte_counts, kind_of, rounded_over
from stepquant.core.pack import pack
from stepquant.core.ranges import minmax
from stepquant.errors import ArtifactError, PlanError
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import integer_layer, lower
from tests.conftest import make_one_level
from tests.contracts.smallest import made, smallest
from tests.methods.reloaded import reloaded

pytestmark = pytest.mark.usefixtures("coarse")
METHODS: dict[str, dict[str, Any]] = {
    "minmax": {},
    "ptq4dm": {},
    "brecq": {"iterations": 4},
    "tfmq": {"iterations": 4},
    "gptq": {},
    "svdquant": {"rank": 2},
    "efficientdm": {"rank": 2},
    "quest": {"tuned": "all", "tuning_iterations": 4},
    "tdq": {},
    "apqdm": {},
    "viditq": {},
    "adatsq": {},
    "mixdq": {},
    "dilatequant": {},
    "qncd": {},
    "dgq": {},
}
FOUR = Grid.parse("uint4/tensor/codebook")


@pytest.fixture
def small(source: Source) -> Source:
    pipeline = DDIMPipeline(make_one_level(groups=4), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return replace(source, pipeline=pipeline, sampling=Sampling(4))


def plan(bits: int = 4) -> Plan:
    grid = Grid.parse(f"uint{bits}/tensor/codebook")
    return scheme("w8a8").with_rules(
        [Rule(grid, "few bytes", ("conv", "q", "head"), ("input",))], "codebooks"
    )


def run(source: Source, name: str, **settings: Any) -> Artifact:
    return made(smallest(name, **settings), plan(), source)


@pytest.mark.parametrize("name", METHODS)
def test_codes_are_those_of_the_codebook(name: str, small: Source) -> None:
    artifact = run(small, name, **METHODS[name])
    denoiser = Denoiser.of(small.pipeline)
    lowered = lower(copy.deepcopy(denoiser.model), artifact, torch.float32)
    found = {path: spec.input for path, spec in artifact.layers.items() if spec.input and spec.input.codebook}
    assert found
    seen: dict[str, set[int]] = {}
    hooks = []
    for path, grid in found.items():
        layer: Any = lowered.get_submodule(path)
        assert layer.integer
        codebook = artifact.tensors[f"{path}.input_codebook"]
        assert codebook.dtype == torch.uint8
        assert codebook.shape == (len(artifact.tensors[f"{path}.input_scale"]), grid.levels)
        assert (codebook.int().diff() >= 0).all()

        def hook(module: Any, args: tuple[Tensor, ...], path: str = path) -> None:
            assert module.code.zero_point in module.input_codebook[module.row]
            seen[path] = {*module.prepared().kernels[module.row].moves.bytes} - {
                *module.input_codebook[module.row].tolist()
            }

        hooks.append(layer.register_forward_pre_hook(hook))
    (records,) = small.record(every(1, [1])).batches(2)
    with torch.no_grad():
        want, got = (one.predict(records.arguments) for one in (denoiser, Denoiser(lowered)))
    assert (want - got).norm() < want.norm()
    assert all(not others for others in seen.values())
    assert len(seen) == len(found)


def test_learning_keeps_the_codebook_and_moves_the_scale(small: Source) -> None:
    learnt, base = (
        run(small, "brecq", iterations=4, step_iterations=count, step_rate=0.05) for count in (20, 0)
    )
    named = [name for name in base.tensors if name.endswith("input_codebook")]
    assert named
    scales = [name.replace("codebook", "scale") for name in named]
    assert any(not torch.equal(learnt.tensors[name], base.tensors[name]) for name in scales)


def test_a_folder_holds_the_bytes_of_each_input_and_loads_to_the_same(small: Source, tmp_path: Path) -> None:
    loaded = reloaded(small.pipeline, plan(3), tmp_path / "saved")
    assert any(name.endswith("input_codebook") for name in loaded.unet.state_dict())


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_products_are_those_of_the_moved_codes(kind: str, bits: int) -> None:
    """A layer whose inputs lie on the codebook already computes the same without one, and others may make its codes."""
    torch.manual_seed(bits)
    layer = torch.nn.Linear(48, 20) if kind == "linear" else torch.nn.Conv2d(16, 20, 3, padding=1)
    weight, codebook = Grid.parse("int8/channel"), torch.randint(0, 256, (1, 2**bits)).sort(1).values
    tensors = {
        "weight": pack(torch.randint(-127, 128, layer.weight.shape), weight),
        "weight_scale": torch.rand(20) * 0.01,
    }
    ranges = {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.tensor([117]).int()}

    def layer_of(text: str, **more: Tensor) -> IntegerLayer:
        new = integer_layer(layer, LayerSpec(weight, Grid.parse(text)), "layer")
        new._buffers |= tensors | ranges | {"bias": layer.bias.detach(), **more}
        return new

    codebook[0, codebook[0].sub(117).abs().argmin()] = 117
    own, plain = (
        layer_of(f"uint{bits}/tensor/codebook", input_codebook=codebook.to(torch.uint8)),
        layer_of("uint8/tensor"),
    )
    x = torch.randn(5, 48) if kind == "linear" else torch.randn(2, 16, 6, 6)
    moved = tables_of(codebook.float())[0][ops.quantize(x, plain.code).long()]
    assert own.kernel is not None
    assert torch.equal(own(x), plain((moved - 117) * 0.02))


def test_levels_of_an_activation_are_the_best_for_what_was_seen() -> None:
    rows = torch.nn.functional.gelu(torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)))
    levels = kind_of(FOUR).fit(rows, FOUR, minmax)
    plain = Grid.parse("uint8/tensor")
    q = quantize(rows, levels.scale, levels.zero_point, plain)
    assert torch.equal(levels.codebook[0], best_bytes(byte_counts(q), 16, int(levels.zero_point)))
    error, evenly = ((x - rows).square().sum() for x in (levels.values(rows), rounded_over(rows, *minmax(rows, FOUR), Grid.parse("uint4/tensor"))))  # fmt: skip
    assert error < 0.3 * evenly
    assert torch.equal(rounded_over(rows, *minmax(rows, FOUR), FOUR), levels.values(rows))
    assert torch.equal(levels.through(rows), levels.values(rows))


@pytest.mark.parametrize(("port", "grid"), [("weight", "uint4/tensor/codebook"), ("input", "int4/channel/codebook"), ("query", "uint4/tensor/codebook")])  # fmt: skip
def test_codebooks_lie_where_they_belong(port: str, grid: str, small: Source) -> None:
    roles = ("product",) if port == "query" else ("conv",)
    wrong = scheme("w8a8").with_rules([Rule(Grid.parse(grid), "wrong", roles, (port,))], "wrong")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="cannot carry"):
        wrong.resolve(Denoiser.of(small.pipeline))
    if port == "input":
        with pytest.raises(ArtifactError, match="cannot carry its grid"):
            LayerSpec.from_json({"weight": "int8/channel", "input": grid})
