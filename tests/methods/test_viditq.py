from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline, UNet2DModel

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.errors import MethodError
from stepquant.evaluate.cost import coverage
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.runtime.lower import lower
from tests.conftest import without_ends

pytestmark = pytest.mark.usefixtures("coarse")
FEW = {"samples": 8, "trajectories": 3, "initial": 2}
TURNED = ("q", "k", "v", "attn_out", "ff_in", "ff_out")


@pytest.fixture
def of_classes(class_pipeline: DiTPipeline, source: Source) -> Source:
    return replace(source, pipeline=class_pipeline, sampling=Sampling(3), batch=2)


def run(source: Source, plan: str = "w4a4", **settings: Any) -> Artifact:
    return methods.build("viditq", FEW | settings)(Denoiser.of(source.pipeline), without_ends(plan), source)


def test_the_linears_of_blocks_read_balanced_and_rotated_tokens_and_run_in_integers(
    of_classes: Source,
) -> None:
    denoiser = Denoiser.of(of_classes.pipeline)
    before = copy.deepcopy(denoiser.model.state_dict())
    artifact, roles = run(of_classes), denoiser.sites()
    assert all(torch.equal(value, before[key]) for key, value in denoiser.model.state_dict().items())
    for path, spec in artifact.layers.items():
        turned = roles.get(path) in TURNED  # tables have no role of a layer
        assert (str(spec.input) == "int4/token", spec.balanced) == (turned, turned)
        width = denoiser.model.get_submodule(path).weight.shape[1]
        assert spec.rotation == ({32: 16, 128: 64}[width] if turned else 0)
    assert not any(
        f"{path}.input_scale" in artifact.tensors for path in artifact.layers if roles.get(path) in TURNED
    )
    lowered = lower(copy.deepcopy(denoiser.model), artifact, torch.float32)
    (records,) = of_classes.record(every(1, [1])).batches(2)
    rows = {row["path"]: row for row in coverage(denoiser, Denoiser(lowered), records.arguments)}
    assert all(rows[path]["integer"] for path in artifact.layers if roles.get(path) in TURNED)


def test_factors_come_from_the_first_steps_of_the_float_model(of_classes: Source) -> None:
    artifact, path = run(of_classes), "transformer_blocks.1.ff.net.0.proj"
    denoiser, seen = Denoiser.of(of_classes.pipeline), []
    layer = denoiser.model.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    data = of_classes.record(every(3, [0, 1]))
    first = [record for record, step in enumerate(data.steps().tolist()) if step < 2]
    with torch.no_grad():
        denoiser.predict(data.take(first).arguments)
    hook.remove()
    greatest = seen[0].abs().amax(1).mean(0)
    divisors = greatest**0.3 / layer.weight.double().abs().amax(0) ** 0.7
    product = artifact.tensors[f"{path}.input_factors"].double() * divisors
    torch.testing.assert_close(product, product[:1].expand_as(product), rtol=1e-3, atol=0)


def test_fields_change_what_they_say(of_classes: Source) -> None:
    unbalanced, straight = run(of_classes, balance=False), run(of_classes, group=0)
    assert not any(spec.balanced for spec in unbalanced.layers.values())
    assert any(spec.rotation for spec in unbalanced.layers.values())
    assert not any(spec.rotation for spec in straight.layers.values())
    assert any(spec.balanced for spec in straight.layers.values())
    with pytest.raises(MethodError, match="'group'"):
        run(of_classes, group=32)


def test_where_no_activation_has_a_range_the_first_steps_alone_are_recorded(
    of_classes: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, own = [], Source.record
    monkeypatch.setattr(Source, "record", lambda self, picks: asked.extend(picks) or own(self, picks))
    run(of_classes, "w8a8-dynamic")
    assert {pick.step for pick in asked} == {0, 1}


def test_models_and_schemes_that_it_is_not_for_are_refused(source: Source, of_classes: Source) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = UNet2DModel(
        8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, add_attention=False, **blocks
    )
    pipeline = DDIMPipeline(model.eval(), DDIMScheduler())
    for where, plan in ((replace(source, pipeline=pipeline), "w8a8"), (of_classes, "w4a16")):
        with pytest.raises(MethodError, match="no linear whose inputs could be quantized by the token"):
            run(where, plan)
    assert not list(source.cache.rglob("*.safetensors"))
