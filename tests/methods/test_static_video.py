from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline, UNet2DModel
from torch import Tensor

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import dequantize
from stepquant.core.pack import unpack
from stepquant.errors import MethodError
from stepquant.evaluate.cost import coverage
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import lower
from tests.models.steered import source_of

pytestmark = pytest.mark.usefixtures("coarse")
MAKER, READERS = "norm1.linear", ("attn1.to_q", "attn1.to_k", "attn1.to_v")
BLOCK = "transformer_blocks.1"


@pytest.fixture
def of_classes(class_pipeline: DiTPipeline, source: Source) -> Source:
    return replace(source, pipeline=class_pipeline, sampling=Sampling(3), batch=2)


def run(source: Source, plan: str = "w8a8", **settings: Any) -> Artifact:
    method = methods.build("static_video", {"samples": 16} | settings)
    return method(Denoiser.of(source.pipeline), scheme(plan), source)


def stored(artifact: Artifact, path: str, like: Tensor) -> Tensor:
    """The weight that the integers stand for."""
    spec = artifact.layers[path]
    integers = unpack(artifact.tensors[f"{path}.weight"], spec.weight, like.numel()).float()
    return dequantize(
        integers.reshape(like.shape), artifact.tensors[f"{path}.weight_scale"][:, None], torch.zeros(())
    )


def test_every_range_has_a_row_for_every_step_and_runs_in_integers(of_classes: Source) -> None:
    artifact, model = run(of_classes), of_classes.pipeline.transformer
    assert artifact.steps.times == artifact.steps.groups == 3
    scales = [v for name, v in artifact.tensors.items() if name.endswith("input_scale")]
    assert scales
    assert all(value.shape == (3,) for value in scales)
    assert any(len(value.unique()) == 3 for value in scales)
    balanced = {path.rpartition(f"{BLOCK}.")[2] for path, spec in artifact.layers.items() if spec.balanced}
    assert {path for path in balanced if "blocks" not in path} == {"attn1.to_out.0", "ff.net.2"}
    lowered = lower(copy.deepcopy(model), artifact, torch.float32)
    (records,) = of_classes.record(every(1, [1])).batches(2)
    rows = {
        r["path"]: r for r in coverage(Denoiser.of(of_classes.pipeline), Denoiser(lowered), records.arguments)
    }
    assert all(rows[f"{BLOCK}.{name}"]["integer"] for name in (*READERS, "attn1.to_out.0", "ff.net.2"))


def test_factors_are_those_of_the_equation_and_go_into_the_layer_before(of_classes: Source) -> None:
    """What the makers of shift and scale return shows the factors, and what readers lost shows the same."""
    model, artifact = of_classes.pipeline.transformer, run(of_classes, samples=18)
    maker = model.get_submodule(f"{BLOCK}.{MAKER}")
    width = maker.in_features
    kept = stored(artifact, f"{BLOCK}.{MAKER}", maker.weight) / maker.weight.detach()
    shift, scale, gate = (kept[i * width : (i + 1) * width].median(1).values for i in range(3))
    bias = artifact.tensors[f"{BLOCK}.{MAKER}.bias"][width : 2 * width] + 1
    factors = bias / (maker.bias.detach()[width : 2 * width] + 1)
    torch.testing.assert_close(shift, factors, rtol=0.02, atol=0)
    torch.testing.assert_close(scale, factors, rtol=0.02, atol=0)
    torch.testing.assert_close(gate, torch.ones(width), rtol=0.02, atol=0)

    seen: list[Tensor] = []
    layer = model.get_submodule(f"{BLOCK}.{READERS[0]}")
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    data = of_classes.record(every(6, range(3)))
    with torch.no_grad():
        for records in data.batches(4):
            Denoiser(model).predict(records.arguments)
    hook.remove()
    most = torch.cat(seen).abs().amax((0, 1)).double()
    weights = torch.cat([model.get_submodule(f"{BLOCK}.{name}").weight.detach() for name in READERS])
    product = factors.double() * most**0.5 / weights.double().abs().amax(0) ** 0.5
    torch.testing.assert_close(product, product[:1].expand_as(product), rtol=1e-3, atol=0)
    for name in READERS:
        exact = model.get_submodule(f"{BLOCK}.{name}").weight.detach()
        found = stored(artifact, f"{BLOCK}.{name}", exact) * factors
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_without_layers_that_make_shift_and_scale_inputs_are_multiplied(tmp_path: Path) -> None:
    artifact = run(source_of("wan", tmp_path))
    readers = [path for path in artifact.layers if path.endswith("attn1.to_q")]
    assert readers
    assert all(artifact.layers[path].balanced for path in readers)


def test_models_and_schemes_that_it_is_not_for_are_refused(source: Source, of_classes: Source) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = UNet2DModel(
        8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, add_attention=False, **blocks
    )
    pipeline = DDIMPipeline(model.eval(), DDIMScheduler())
    cases = (
        (replace(source, pipeline=pipeline), "w8a8"),
        (of_classes, "w4a16"),
        (of_classes, "w8a8-dynamic"),
    )
    for where, plan in cases:
        with pytest.raises(MethodError, match="no linear whose input channels could be balanced"):
            run(where, plan)
    assert not list(source.cache.rglob("*.safetensors"))
