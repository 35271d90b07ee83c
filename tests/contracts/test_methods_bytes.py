"""What every method and correction promises about the bytes that it makes; found in the registry, never named."""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn

from stepquant import hub, methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core import freed, mapped
from stepquant.core.grid import Grid, GridError
from stepquant.job.in_files import load_in_files
from stepquant.job.pipelines import load
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent
from stepquant.quant import freeze
from stepquant.runtime.lower import lower
from tests.contracts.resident import all_tensors, in_memory
from tests.contracts.smallest import Counting, Killed, Nearest, digest, made, plan_for, smallest

pytestmark = pytest.mark.usefixtures("coarse")
NAMES = methods.names()
WIDEST = 8  # bits
LARGE = 500  # elements of a weight
TELLS = sys.platform == "linux"  # which memory is a file's


def tiniest() -> UNet2DModel:
    """One level: a residual block and attention on each side of a middle block, and skip concatenations."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    ).eval()


def source_in(folder: Path, schedule: str = "linear") -> Source:
    """Another noise schedule gives other records: of the same model, at the same steps, from the same seeds."""
    pipeline = DDIMPipeline(tiniest(), DDIMScheduler(beta_schedule=schedule))
    pipeline.set_progress_bar_config(disable=True)
    return Source(pipeline, Sampling(4), batch=4, cache=folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    source_in(folder).pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def first(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Artifact, int]]:
    """The artifact of every method that was asked for, and how many items it tracked."""
    folder = tmp_path_factory.mktemp("first")

    class Made(dict[str, tuple[Artifact, int]]):
        def __missing__(self, name: str) -> tuple[Artifact, int]:
            counting = Counting()
            # Loaded, because the last bits of torch's products depend on where in memory a weight begins.
            source = dataclasses.replace(source_in(folder / name), progress=counting, pipeline=load(saved))
            self[name] = made(smallest(name), plan_for(name), source), counting.done
            return self[name]

    return Made()


def answers(model: nn.Module, source: Source) -> torch.Tensor:
    """Predictions on states of every step."""
    records = source.record(every(2, range(source.sampling.steps)))
    with torch.no_grad():
        return Denoiser(model).predict(records.take(range(len(records))).arguments)


def lowered(artifact: Artifact, source: Source) -> nn.Module:
    return lower(copy.deepcopy(source.pipeline.unet), artifact, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_calibration_changes_the_bytes(
    name: str, first: dict[str, tuple[Artifact, int]], tmp_path: Path
) -> None:
    """Unless the class says `calibrates = False`; then it must change none."""
    other = made(smallest(name), plan_for(name), source_in(tmp_path, "squaredcos_cap_v2"))
    assert (digest(other) != digest(first[name][0])) == methods.kind(name).calibrates


def test_calibration_without_effect_would_be_noticed(tmp_path: Path) -> None:
    """What the contract compares is equal for a method that reads its records and makes nothing of them."""

    class Deaf(Nearest):
        calibrates: ClassVar[bool] = True

        def __call__(self, denoiser, plan, source):  # type: ignore[no-untyped-def]
            source.record(every(2, range(source.sampling.steps)))
            return super().__call__(denoiser, plan, source)

    one, two = (source_in(tmp_path / kind, kind) for kind in ("linear", "squaredcos_cap_v2"))
    states = [answers(source.pipeline.unet, source) for source in (one, two)]
    assert not torch.equal(*states), "the records differ"
    plan = plan_for(next(filter(methods.corrects, NAMES)))
    assert digest(made(Deaf(), plan, one)) == digest(made(Deaf(), plan, two))


@pytest.mark.parametrize("name", NAMES)
def test_the_widest_grids_are_near_float(
    name: str, first: dict[str, tuple[Artifact, int]], tmp_path: Path
) -> None:
    with pytest.raises(GridError):
        Grid(WIDEST + 1)
    source = source_in(tmp_path)
    exact = answers(source.pipeline.unet, source)
    wide = made(smallest(name), plan_for(name, WIDEST), source)
    far, near = ((answers(lowered(a, source), source) - exact).norm() for a in (first[name][0], wide))
    assert near < 0.1 * exact.norm(), "most of it from ranges, which four records decide"
    assert near < 0.75 * far


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_and_loaded_draws_the_same_images(
    name: str, first: dict[str, tuple[Artifact, int]], tmp_path: Path
) -> None:
    artifact, source = first[name][0], source_in(tmp_path)
    hub.attach(source.pipeline.unet, artifact)
    seeds = [3, 4]
    want = run(source.pipeline, seeds, source.sampling)
    source.pipeline.unet.save_pretrained(tmp_path / "unet")
    source.pipeline.unet = UNet2DModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(run(source.pipeline, seeds, source.sampling), want)


def large() -> set[int]:
    """Elements of the convolutions, whose other weights are no larger than what else a method may keep."""
    return {value.numel() for value in tiniest().parameters() if value.numel() > LARGE}


@pytest.fixture
def own(name: str, first: dict[str, tuple[Artifact, int]]) -> tuple[Artifact, int]:
    return first[name]


@pytest.fixture
def taken(own: tuple[Artifact, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of all tensors in memory that are as large as a large weight and come later, when a method begins to pack."""
    seen, packing, wanted = [], freed.trim, large()

    def look() -> None:
        seen.append(in_memory(one for one in all_tensors() if one.numel() in wanted))
        packing()

    if TELLS:
        monkeypatch.setattr(freeze, "trim", look)
    gc.freeze()  # what is there already is not looked at
    yield seen
    gc.unfreeze()


@pytest.mark.skipif(not TELLS, reason="only Linux tells which memory is a file's")
def test_what_is_in_memory_is_seen(tmp_path: Path) -> None:
    weights = list(tiniest().parameters())
    assert in_memory(weights) == sum(one.nbytes for one in weights)
    assert in_memory([mapped.copied(one.detach(), tmp_path) for one in weights]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_files_give_the_same_bytes_to_a_run_that_was_interrupted(
    name: str, own: tuple[Artifact, int], saved: Path, taken: list[int], tmp_path: Path
) -> None:
    """Begun with an empty cache, killed where it learns, which is what comes last, and then left to end; no float of any
    weight is in memory beside its file."""
    artifact, items = own

    def filed(progress: Progress) -> Source:
        pipeline = load_in_files(str(saved), "cpu", Silent())
        return dataclasses.replace(source_in(tmp_path), pipeline=pipeline, memory=0, progress=progress)

    with pytest.raises(Killed):
        made(smallest(name), plan_for(name), filed(Counting(items * 4 // 5)))
    assert digest(made(smallest(name), plan_for(name), filed(Silent()))) == digest(artifact)
    assert taken == [0] or not TELLS
