"""Ends of what layers and products read, noted while the float model runs, against calls with quantizers for them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from stepquant.calib.calibset import CalibSet
from stepquant.calib.ends import noting
from stepquant.calib.pick import every as every_step
from stepquant.calib.record import Source
from stepquant.calib.rows import Rows, shard_of
from stepquant.fit import uneven as looking
from stepquant.fit.uneven import Steps, ends_passed, ends_recorded, few_of_each, uneven
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.insert import Place, insert
from stepquant.quant.schemes import scheme
from tests.models import every
from tests.models.tiny import CASES

# Images, frames folded into the batch, lists of images, texts beside the image, windows.
KINDS = ("text_to_image", "image_to_video", "z_image", "sd3", "flux", "wan", "lumina2")
EXPERTS = (
    "HiDreamImageTransformer2DModel"  # which read some tokens of all samples, so that no row belongs to one
)


def one_call(denoiser: Denoiser, arguments: dict[str, Any], folder: Path) -> CalibSet:
    """A call of two samples as it is recorded, with what its layers read."""
    with torch.no_grad(), noting(denoiser) as ends:
        rows = Rows(denoiser, [0, 1], ends)
        rows.keep(arguments, [0, 1], 0, 0, "")
        denoiser.predict(arguments)
    columns, form = shard_of([("call", rows)])
    save_file(columns, folder / "call", metadata=form)
    return CalibSet((folder / "call",), ((0, 0), (0, 1)), denoiser.family.x, denoiser.family.t, {})


def both_ways(denoiser: Denoiser, data: CalibSet) -> tuple[dict[Place, Steps] | None, dict[Place, Steps]]:
    """The ends as they were recorded, and as calls with quantizers see them."""
    with torch.no_grad(), insert(denoiser, scheme("w8a8")) as network:
        network.switch(weights=False, inputs=False)
        quantizers = [q for q in network.ranged() if q.site.port != "probabilities"]
        chosen = few_of_each(data)
        recorded = ends_recorded([q.site for q in quantizers], data, chosen)
        return recorded, ends_passed(denoiser, quantizers, data, chosen)


def check_same(recorded: dict[Place, Steps] | None, passed: dict[Place, Steps]) -> None:
    assert recorded is not None
    assert {place for place, steps in recorded.items() if steps} == set(passed)
    assert len(passed) > 10
    for place, steps in passed.items():
        assert recorded[place].keys() == steps.keys()
        for step, ends in steps.items():
            torch.testing.assert_close(recorded[place][step], ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_what_was_noted_is_what_quantizers_see(name: str, tmp_path: Path) -> None:
    model, arguments, *_ = CASES[name]()
    denoiser = Denoiser(model.eval())
    check_same(*both_ways(denoiser, one_call(denoiser, arguments, tmp_path)))


def test_what_belongs_to_no_sample_is_not_known(tmp_path: Path) -> None:
    model, arguments = every.BUILDERS[EXPERTS]()
    denoiser = Denoiser(model)
    recorded, passed = both_ways(denoiser, one_call(denoiser, arguments, tmp_path))
    assert recorded is None
    assert any("experts" in path for path, _ in passed)


@pytest.fixture
def source(text_pipeline: StableDiffusionPipeline, tmp_path: Path) -> Source:
    return Source(text_pipeline, Sampling(3, prompts=("a b", "c")), batch=2, cache=tmp_path)


def test_steps_and_guidance_branches_keep_their_own(source: Source) -> None:
    """Batches are mixed anew, and some of their rows are not wanted."""
    data = source.record([*every_step(3, (0, 2)), *every_step(1, (1,))])
    assert len(data.shards) > 1
    check_same(*both_ways(Denoiser.of(source.pipeline), data))


def test_records_that_say_it_spare_the_calls(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    data, denoiser = source.record(every_step(2, range(3))), Denoiser.of(source.pipeline)
    with monkeypatch.context() as patch:
        patch.setattr(looking, "ends_recorded", lambda *_: None)
        passed = uneven(denoiser, scheme("w8a8"), data, small=0.9)
    assert passed
    monkeypatch.setattr(looking, "ends_passed", None)
    assert uneven(denoiser, scheme("w8a8"), data, small=0.9) == pytest.approx(passed, rel=1e-4)


def test_noting_changes_nothing_and_leaves_nothing(source: Source) -> None:
    denoiser = Denoiser.of(source.pipeline)
    data = source.record(every_step(2, (1,)))
    arguments = data.take([0, 1]).arguments
    with torch.no_grad():
        before = denoiser.predict(arguments)
        with noting(denoiser) as ends:
            found = ends.of_next_call(2, (0, 1))
            assert torch.equal(denoiser.predict(arguments), before)
    assert (found[..., 0] <= found[..., 1]).all()
    kept = found.clone()
    with torch.no_grad():
        denoiser.predict({name: value + 1 for name, value in arguments.items()})
    assert torch.equal(found, kept)
    assert not any(module._forward_pre_hooks for module in denoiser.model.modules())
