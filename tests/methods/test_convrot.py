from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline, UNet2DModel
from scipy.linalg import hadamard as sylvester
from torch import Tensor

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.pack import unpack
from stepquant.core.rotation import rotate
from stepquant.errors import MethodError
from stepquant.evaluate.cost import coverage
from stepquant.hub.on_load import rounded
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.runtime.lower import lower
from tests.conftest import without_ends
from tests.core.test_rotation import hadamard

pytestmark = pytest.mark.usefixtures("coarse")
FEW = {"samples": 8, "trajectories": 3}
FEED = "transformer_blocks.1.ff.net.2"  # 128 inputs: groups of 64


@pytest.fixture
def of_classes(class_pipeline: DiTPipeline, source: Source) -> Source:
    return replace(source, pipeline=class_pipeline, sampling=Sampling(3), batch=2)


def run(source: Source, plan: str = "w4a4", **settings: Any) -> Artifact:
    return methods.build("convrot", FEW | settings)(Denoiser.of(source.pipeline), without_ends(plan), source)


def turned(x: Tensor, group: int) -> Tensor:
    """With the matrix written out."""
    return (x.double().unflatten(-1, (-1, group)) @ hadamard(group)).flatten(-2)


def nearest(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Integers of every row, and its scale."""
    scale = x.abs().amax(-1, keepdim=True) / most
    return (x / scale).round(), scale


@pytest.mark.parametrize(("plan", "most"), [("w8a8", 127), ("w4a4", 7)])
def test_a_linear_is_the_product_of_rotated_rows_rounded_to_nearest(
    plan: str, most: int, of_classes: Source
) -> None:
    model = of_classes.pipeline.transformer
    exact = model.get_submodule(FEED)
    artifact = run(of_classes, plan)
    spec = artifact.layers[FEED]
    assert (spec.rotation, spec.balanced, spec.input.granularity) == (64, False, "token")
    want, scale = nearest(turned(exact.weight.detach(), 64), most)
    found = unpack(artifact.tensors[f"{FEED}.weight"], spec.weight, want.numel()).reshape(want.shape)
    assert (found != want).float().mean() < 1e-3, "but for ties"
    torch.testing.assert_close(
        artifact.tensors[f"{FEED}.weight_scale"].double(), scale[:, 0], rtol=1e-5, atol=0
    )

    lowered = lower(copy.deepcopy(model), artifact, torch.float32)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)) + 2.0
    codes, steps = nearest(turned(x, 64), most)
    by_hand = (codes @ found.double().T) * steps * scale[:, 0] + exact.bias.double()
    torch.testing.assert_close(lowered.get_submodule(FEED)(x).double(), by_hand, rtol=1e-3, atol=1e-3)
    (records,) = of_classes.record(every(1, [1])).batches(2)
    rows = coverage(Denoiser.of(of_classes.pipeline), Denoiser(lowered), records.arguments)
    turns = [row for row in rows if row["path"] in artifact.layers and artifact.layers[row["path"]].rotation]
    assert len(turns) == 13, "six linears of both blocks, and the last layer"
    assert all(row["integer"] for row in turns)


def test_without_ranges_nothing_is_recorded_and_bytes_are_those_of_rounding_while_loading(
    of_classes: Source,
) -> None:
    weight = of_classes.pipeline.transformer.get_submodule(FEED).weight.detach()
    artifact = run(of_classes, "w8a8-dynamic", group=16)
    assert not list(of_classes.cache.rglob("*.safetensors"))
    spec = artifact.layers[FEED]
    assert spec.rotation == 16
    for name, value in rounded(weight, spec).items():
        assert torch.equal(artifact.tensors[f"{FEED}.{name}"], value)


def test_a_row_of_one_sign_becomes_an_outlier_by_sylvesters_matrix_alone() -> None:
    row = 3 + torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    other = row.double() @ torch.from_numpy(sylvester(256)).double() / 16
    assert other.abs().max() > 10 * row.abs().mean()
    assert rotate(row, 256).abs().max() < 2.5 * row.abs().mean()


def test_models_and_schemes_that_it_is_not_for_are_refused(source: Source, of_classes: Source) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = UNet2DModel(
        8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, add_attention=False, **blocks
    )
    pipeline = DDIMPipeline(model.eval(), DDIMScheduler())
    for where, plan in ((replace(source, pipeline=pipeline), "w8a8"), (of_classes, "w4a16")):
        with pytest.raises(MethodError, match="no linear whose inputs could be quantized by the token"):
            run(where, plan)
    with pytest.raises(MethodError, match="'group'"):
        run(of_classes, group=32)
    assert not list(source.cache.rglob("*.safetensors"))
